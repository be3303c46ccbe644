"""What has to be known first on a GPU, in half a minute: each way in, once. In a process of its own."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from gpu_models import (
    DEVICE,
    EAGER,
    ON_CUDA,
    Told,
    assert_alike,
    needs_cuda,
    needs_device,
    small_llama,
    stitched_decoder,
)
from torch import nn

import piecework
from piecework.integrations.transformers import stitch, stitched_module
from piecework.runtime.batch.forward_context import current_forward_context

pytestmark = [pytest.mark.gpu, needs_device]


@pytest.mark.parametrize("mode", ["PIECEWISE", "FULL", "FULL_AND_PIECEWISE"])
def test_capture_and_replay(mode):
    model, stitched = stitched_decoder(EAGER)
    stitched.capture([1, 2, 4, 8], mode=mode, progress=False)
    assert_alike(stitched, model, range(1, 11))
    served = "FULL" if mode == "FULL" else "PIECEWISE"
    modes = {row.mode for row in stitched.call_report()}
    assert modes == {served, "NONE"}, "sizes to 8 are replayed, larger ones run uncaptured"


@piecework.splitting_op("gpu_tests::doubled", mutates_args=("out",), rows="independent")
def doubled(x: torch.Tensor, out: torch.Tensor) -> None:
    context = current_forward_context()
    if context is not None and context.dry:
        out.copy_(x)
        return
    from gpu_kernels import launch_double  # a kernel that nobody launched before

    launch_double(x, out)


class Doubles(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x)
        doubled(x, out := torch.empty_like(x))
        return out + 1


@needs_cuda
def test_a_full_graph_whose_operator_launches_a_new_kernel_where_it_is_not_dry():
    model = Doubles().to(DEVICE).eval()
    stitched = piecework.compile(model, (torch.randn(8, 16, device=DEVICE),), config=EAGER)
    stitched.capture([4], mode="FULL", progress=False, estimate=False)
    with torch.no_grad():
        x = torch.randn(4, 16, device=DEVICE)
        torch.testing.assert_close(stitched(x), 2 * model.enter(x) + 1, rtol=1e-3, atol=1e-3)
    assert {row.mode for row in stitched.call_report()} == {"FULL"}


@needs_cuda
def test_a_size_that_fails_leaves_the_others_captured_and_nothing_reserved(monkeypatch):
    monkeypatch.setattr(Told, "fails_at", 4)
    model, stitched = stitched_decoder(EAGER)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    for mode in ("FULL", "FULL_AND_PIECEWISE", "FULL"):
        told = {"mode": mode, "on_failure": "uncaptured", "progress": False, "estimate": False}
        stitched.capture([1, 2, 4, 8], **told)
        outcomes = stitched.static_graphs.report.outcomes
        failed = {(o.key[0].name, o.key[1].num_tokens) for o in outcomes if o.error}
        assert failed == {("FULL", 4)}
        assert_alike(stitched, model, range(1, 9))
        torch.randn(3, device="cuda")  # the generators know that capturing is over
        stitched.static_graphs.release()
        torch.cuda.empty_cache()
        print(f"{torch.cuda.memory_reserved() - before} bytes stay reserved")
    # Older torch keeps a workspace of cuBLAS for each memory that a product was captured into.
    kept = 0 if hasattr(torch.cuda.CUDAGraph, "capture_end_pre") else 6 * 40 << 20
    assert torch.cuda.memory_reserved() - before <= kept + (8 << 20)
    monkeypatch.setattr(Told, "fails_at", 0)
    stitched.capture([1, 2, 4, 8], mode="FULL_AND_PIECEWISE", progress=False)
    assert_alike(stitched, model, range(1, 9))


def test_generate_batch_with_capture():
    transformers = pytest.importorskip("transformers")
    model = small_llama(torch.float32)
    prompts = [torch.randint(1, 512, (n,)).tolist() for n in (5, 9, 3)]
    pages = transformers.ContinuousBatchingConfig(
        page_size=8, num_blocks=16, max_batch_tokens=32, max_requests_per_batch=4
    )
    how = transformers.GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=0)

    def answers():
        done = model.generate_batch(
            prompts, generation_config=how, continuous_batching_config=pages
        )
        return [done[key].generated_tokens for key in sorted(done)]

    plain = answers()
    stitch(model, config=EAGER, capture=[1, 2, 4, 8, 32])
    assert answers() == plain
    assert stitched_module(model).call_report()


def test_two_threads_whose_models_share_memory():
    (one, first), (two, second) = stitched_decoder(EAGER), stitched_decoder(EAGER, layers=2)
    first.capture([1, 4, 8], progress=False, estimate=False)
    graphs = first.static_graphs.graphs
    second.capture([1, 4, 8], memory_of=graphs, progress=False, estimate=False)

    def serve(model, stitched):
        with torch.cuda.stream(torch.cuda.Stream()) if ON_CUDA else nullcontext():
            assert_alike(stitched, model, [4, 8, 1, 3] * 5)

    with ThreadPoolExecutor(2) as pool:
        for each in [pool.submit(serve, *pair) for pair in ((one, first), (two, second))]:
            each.result(60)
    first.static_graphs.release()
    assert_alike(second, two, (1, 4, 8))
