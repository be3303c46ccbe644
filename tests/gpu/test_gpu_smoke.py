"""What has to be known first on a GPU, in half a minute: each way in, once. In a process of its own."""

from __future__ import annotations

import threading

import pytest
import torch
from gpu_models import (
    DEVICE,
    EAGER,
    ON_CUDA,
    Told,
    assert_alike,
    batch_of,
    needs_cuda,
    needs_device,
    small_llama,
    stitched_decoder,
)
from torch import nn

import piecework
from piecework.integrations.transformers import how_served, stitch, stitched_module
from piecework.runtime.batch.forward_context import current_forward_context

pytestmark = [pytest.mark.gpu, needs_device]


@pytest.mark.parametrize("mode", ["PIECEWISE", "FULL"])
def test_capture_and_replay(mode):
    model, stitched = stitched_decoder(EAGER)
    stitched.capture([1, 8], mode=mode, progress=False)
    assert_alike(stitched, model, (1, 8))
    assert mode in {row.mode for row in stitched.call_report()}


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
def test_a_size_that_fails_leaves_nothing_reserved(monkeypatch):
    monkeypatch.setattr(Told, "fails_at", 4)
    model, stitched = stitched_decoder(EAGER)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    for _ in range(3):
        told = {"mode": "FULL", "on_failure": "uncaptured", "progress": False, "estimate": False}
        stitched.capture([1, 4, 8], **told)
        assert_alike(stitched, model, (1, 3, 8))
        stitched.static_graphs.release()
        torch.cuda.empty_cache()
        print(f"{torch.cuda.memory_reserved() - before} bytes stay reserved")
    # Older torch keeps a workspace of cuBLAS for each memory that a product was captured into.
    kept = 0 if hasattr(torch.cuda.CUDAGraph, "capture_end_pre") else 6 * 40 << 20
    assert torch.cuda.memory_reserved() - before <= kept + (8 << 20)


def test_generate_with_whole_decode_steps():
    model = small_llama(torch.float32)
    ids = torch.randint(1, 512, (1, 7), device=DEVICE)
    how = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": "static"}
    plain = model.generate(ids, disable_compile=True, **how)
    stitch(model, config=EAGER, capture=[1], max_cache_len=64)
    assert torch.equal(model.generate(ids, disable_compile=True, **how), plain)
    assert not how_served(model).outside


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
    first.capture([4, 8], progress=False)
    second.capture([4, 8], memory_of=first.static_graphs.graphs, progress=False)
    wrong: list[str] = []

    def serve(model, stitched):
        try:
            stream = torch.cuda.Stream() if ON_CUDA else None
            with torch.cuda.stream(stream) if ON_CUDA else torch.no_grad(), torch.no_grad():
                for _ in range(20):
                    given = batch_of(4)
                    torch.testing.assert_close(
                        stitched(*given), model(*given), rtol=1e-3, atol=1e-3
                    )
        except Exception as error:  # noqa: BLE001 - told by the main thread
            wrong.append(repr(error)[:500])

    threads = [threading.Thread(target=serve, args=pair) for pair in ((one, first), (two, second))]
    for each in threads:
        each.start()
    for each in threads:
        each.join(30)
    assert not wrong and not any(each.is_alive() for each in threads)
