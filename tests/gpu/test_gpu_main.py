"""The main path on a GPU: compiled by Inductor, cold and from the cache, captured, every size; transformers; weights, memory and captures of others."""

from __future__ import annotations

import json
import time

import pytest
import torch
from gpu_models import (
    DEVICE,
    EAGER,
    HIDDEN,
    INDUCTOR,
    ON_CUDA,
    Unsigned,
    assert_alike,
    batch_of,
    decoder,
    needs_cuda,
    needs_device,
    small_llama,
    stitched_decoder,
)

import piecework
from piecework.errors import ArtifactError
from piecework.examples import engine
from piecework.integrations.transformers import how_served, stitch, stitched_module, unstitch
from piecework.integrations.transformers.request.state import dry_request
from piecework.runtime import torch_compat
from piecework.runtime.batch.forward_context import set_forward_context

pytestmark = [pytest.mark.gpu, needs_device]
SIZES = [1, 2, 4, 8]


def test_the_first_served_call_is_not_slower_than_a_compilation():
    _, stitched = stitched_decoder(EAGER)
    stitched.capture(SIZES, progress=False)
    given = batch_of(3)
    _synchronize()
    start = time.perf_counter()
    with torch.no_grad():
        stitched(*given)
    _synchronize()
    assert time.perf_counter() - start < 0.3, "nothing is compiled or loaded in the first call"


def test_weights_are_replaced_bound_again_and_captured_again():
    model, stitched = stitched_decoder(EAGER)
    stitched.capture(SIZES, progress=False)
    with torch.no_grad():
        model.head.weight.copy_(model.head.weight * 2)  # in place: graphs read it
    assert_alike(stitched, model, (2, 3))
    model.head.weight = torch.nn.Parameter(model.head.weight + 1, requires_grad=False)
    with pytest.raises(piecework.PieceworkError):
        stitched(*batch_of(2))
    stitched.rebind()
    assert_alike(stitched, model, (2, 3))
    stitched.capture(SIZES, progress=False)
    assert_alike(stitched, model, (2, 3))


@torch.no_grad()
def test_what_a_gpu_copies_only_one_by_one_is_served():
    model = Unsigned()
    given = [torch.arange(8).to(DEVICE, torch.uint16) for _ in range(2)]
    stitched = piecework.compile(model, tuple(given), config=EAGER)
    stitched.capture([2, 4], progress=False)
    for size in (2, 3, 4):
        batch = [each[:size].clone() for each in given]
        for found, expected in zip(stitched(*batch), model(*batch), strict=True):
            assert found.tolist() == expected.tolist()
    assert {row.mode for row in stitched.call_report()} == {"PIECEWISE"}


class Noisy(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand_like(x)


@torch.no_grad()
def test_random_numbers_are_new_in_each_replay_and_follow_the_seed():
    x = torch.zeros(4, HIDDEN, device=DEVICE)
    stitched = piecework.compile(Noisy(), (x,), config=EAGER)
    stitched.capture([4], progress=False)
    one, other = stitched(x), stitched(x)
    assert not torch.equal(one, other) and one.min() >= 0 and one.max() <= 1
    seeded = []
    for _ in range(2):
        torch.manual_seed(3)
        seeded.append([stitched(x), stitched(x)])
    assert torch.equal(seeded[0][0], seeded[1][0]) and torch.equal(seeded[0][1], seeded[1][1])
    assert {row.mode for row in stitched.call_report()} == {"PIECEWISE"}


@needs_cuda
def test_reduce_overhead_elsewhere_and_an_empty_cache_leave_the_graphs_right():
    """Inductor's own graphs clear the workspaces of cuBLAS; what they free must not be what our graphs use."""
    model, stitched = stitched_decoder(EAGER)
    stitched.capture(SIZES, progress=False)
    assert_alike(stitched, model, (1, 8))
    other = torch.compile(torch.nn.Linear(64, 64).cuda(), mode="reduce-overhead")
    x = torch.randn(8, 64, device="cuda")
    with torch.no_grad():
        for _ in range(4):
            other(x)
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    # What was freed is taken by others, and filled.
    taken = [torch.full((1 << 22,), float("nan"), device="cuda") for _ in range(16)]
    assert_alike(stitched, model, range(1, 9))
    torch.cuda.synchronize()
    assert all(bool(each.isnan().all()) for each in taken), "a replay wrote to memory of others"


@needs_cuda
def test_the_workspace_lies_in_the_pool():
    _, stitched = stitched_decoder(EAGER)
    stitched.capture(SIZES, progress=False)
    before = _bytes_in_pool(stitched)
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    after = _bytes_in_pool(stitched)
    assert after["allocated_size"] < before["allocated_size"], "the workspace was not in the pool"
    assert after["total_size"] == before["total_size"], "the pool shrank under its graphs"


def _bytes_in_pool(stitched: piecework.StitchedModule) -> dict[str, int]:
    handle = tuple(stitched.static_graphs.graphs.pool.handle)
    own = [s for s in torch.cuda.memory_snapshot() if tuple(s["segment_pool_id"]) == handle]
    return {name: sum(s[name] for s in own) for name in ("allocated_size", "total_size")}


@needs_cuda
def test_a_capture_around_a_served_call_holds_what_the_call_does():
    model, stitched = stitched_decoder(EAGER)
    stitched.capture(SIZES, progress=False)
    given = batch_of(3)
    with torch.no_grad():
        stitched(*given)
        graph = torch.cuda.CUDAGraph()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            model(*given)  # warms this stream up
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph, stream=side):
            result = stitched(*given)
        for _ in range(2):
            given[0].copy_(batch_of(3)[0])
            graph.replay()
            torch.testing.assert_close(result, model(*given), rtol=1e-3, atol=1e-3)
        assert_alike(stitched, model, (3, 8))


@needs_cuda
@torch.no_grad()
def test_calls_on_several_streams_come_one_after_the_other():
    """Nothing waits between them but what the model does by itself."""
    model, stitched = stitched_decoder(EAGER, layers=12)
    stitched.capture([64], progress=False)
    given = [batch_of(64) for _ in range(24)]
    expected = [model(*each) for each in given]
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    results = []
    for number, each in enumerate(given):
        with torch.cuda.stream(streams[number % 3]):
            results.append(stitched(*each))
    torch.cuda.synchronize()
    torch.testing.assert_close(results, expected, rtol=1e-3, atol=1e-3)


@needs_cuda
def test_kernels_inside_graphs_carry_layer_and_emitted_line(tmp_path):
    if torch_compat.why_kernels_unmarked():
        pytest.skip(torch_compat.why_kernels_unmarked())
    model, stitched = stitched_decoder(EAGER)
    stitched.capture(SIZES, mode="FULL_AND_PIECEWISE", progress=False)
    assert stitched.static_graphs.report.unmarked == ""
    assert_alike(stitched, model, SIZES)
    given = batch_of(3)
    with torch.no_grad(), torch.profiler.profile() as profile:
        stitched(*given)
        torch.cuda.synchronize()
    profile.export_chrome_trace(str(tmp_path / "trace"), **torch_compat.marks_for_trace())
    events = json.loads((tmp_path / "trace").read_text())["traceEvents"]
    kernels = [each["args"] for each in events if each.get("cat") == "kernel"]
    inside = [each for each in kernels if each.get("graph node id")]
    assert inside and all(int(each["line"]) > 0 for each in inside)
    assert {f"layers.{n}" for n in range(3)} <= {each["layer"][:8] for each in inside}


@needs_cuda
def test_memory_comes_back_when_graphs_are_given_up():
    model, stitched = stitched_decoder(EAGER)
    stitched.capture([64, 128], progress=False)
    held = torch.cuda.memory_reserved()
    stitched.static_graphs.release()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() < held
    assert_alike(stitched, model, (2, 64))


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.inductor)])
def test_transformers_generates_the_same_tokens(backend):
    model = small_llama(torch.float32)
    ids = torch.randint(1, 512, (3, 7), device=DEVICE)
    told = {"max_new_tokens": 12, "do_sample": False}
    plain = model.generate(ids, **told)
    stitch(model, config=piecework.CompilationConfig(backend=backend))
    stitched_module(model).capture(
        [1, 2, 4, 8, 32], context_for=dry_request, pad=True, progress=False
    )
    assert torch.equal(model.generate(ids, **told), plain)
    # The static cache makes transformers compile the forward by itself, where it can.
    static = model.generate(ids, cache_implementation="static", disable_compile=True, **told)
    assert torch.equal(static, plain)
    served = {row.mode for row in stitched_module(model).call_report()}
    assert "PIECEWISE" in served
    unstitch(model)
    assert torch.equal(model.generate(ids, **told), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_transformers_decodes_a_static_cache_in_one_graph(dtype):
    model = small_llama(dtype)
    ids = torch.randint(1, 512, (3, 7), device=DEVICE)
    how = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": "static"}
    how |= {"output_logits": True, "return_dict_in_generate": True}

    def generated():
        made = model.generate(ids, **how)  # and its cache, which would keep the graphs' memory
        return made.sequences, made.logits

    stitch(model, config=EAGER)
    tokens, logits = generated()
    unstitch(model)
    stitch(model, config=EAGER, capture=[1, 2, 4], max_cache_len=64)
    for _ in range(2):
        found, found_logits = generated()
        assert dtype is torch.bfloat16 or torch.equal(found, tokens)
        _assert_same_until_rounding_chooses(found_logits, logits)
    rows = stitched_module(model).call_report()
    assert sum(row.calls for row in rows if row.mode == "FULL") == 2 * 11
    assert not how_served(model).outside


def _assert_same_until_rounding_chooses(found, expected):
    """Steps' logits are near each other; a sequence counts up to its first token that differs, of two that were nearly as good."""
    for row in range(len(found[0])):
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one[row], other[row], rtol=5e-2, atol=5e-2)
            if one[row].argmax() != other[row].argmax():
                break


@pytest.mark.inductor
def test_inductor_cold_and_from_the_cache():
    for start in ("cold", "from the cache"):
        torch.compiler.reset()
        model, stitched = stitched_decoder(INDUCTOR)
        reasons = _reasons(stitched)
        assert not any(reasons), f"{start}: pieces are not entered directly: {reasons}"
        assert_alike(stitched, model, (1, 3, 8, 11))
        stitched.capture(SIZES, progress=False)
        assert_alike(stitched, model, range(1, 11))


def _reasons(stitched: piecework.StitchedModule) -> list[str]:
    """Why pieces are not entered directly; "" for those that are."""
    backends = stitched.traces[0].program.backends.values()
    return [
        entry.compiled.indirect_because
        for backend in backends
        for entry in backend.entries.values()
    ]


@needs_cuda
@pytest.mark.inductor
def test_code_for_a_gpu_is_not_saved_yet(tmp_path):
    _, stitched = stitched_decoder(INDUCTOR)
    with pytest.raises(ArtifactError, match="does not travel"):
        stitched.save(tmp_path / "artifact")


@pytest.mark.inductor
def test_an_artifact_is_loaded_captured_and_equal(tmp_path):
    _, stitched = stitched_decoder(EAGER if ON_CUDA else INDUCTOR)
    stitched.save(tmp_path / "artifact")
    torch.compiler.reset()
    again = decoder()
    loaded = piecework.load(tmp_path / "artifact", again)
    assert_alike(loaded, again, (1, 5, 8))
    loaded.capture(SIZES, progress=False)
    assert_alike(loaded, again, range(1, 9))


def test_the_engine_of_the_examples_gives_the_tokens_of_one_by_one_generation(capsys):
    engine.main("eager", sizes=SIZES)
    printed = capsys.readouterr().out
    assert "FULL tokens=8 reqs=8 uniform" in printed
    assert "finished, each with the tokens of one-by-one generation" in printed


def _synchronize() -> None:
    if ON_CUDA:
        torch.cuda.synchronize()


@needs_cuda
@pytest.mark.inductor
def test_each_partition_is_a_cuda_graph() -> None:
    config = INDUCTOR.replace(use_inductor_graph_partition=True, splitting_ops=["gpu_tests::mix"])
    model, stitched = stitched_decoder(config, layers=2)
    with piecework.counters.expect(num_cudagraph_captured=3 * 3):
        stitched.capture([2, 4, 8], progress=False)
    for metadata in (None, 5):  # read at each call, not at the capture
        with set_forward_context(metadata):
            assert_alike(stitched, model, (1, 2, 3, 7, 8, 11))


# Last: a mistake here ends the device's use.
class Wide(torch.nn.Module):
    """Reads its input in whole words of 16 bytes where it may."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x) * 2 + 1


@pytest.mark.inductor
@pytest.mark.parametrize("inside", [False, True])
def test_an_input_at_an_odd_address(inside):
    """The example was aligned; ``x[1:]`` of a longer tensor is not."""
    config = INDUCTOR.replace(use_inductor_graph_partition=inside, splitting_ops=())
    model = Wide()
    stitched = piecework.compile(model, (torch.randn(256, 64, device=DEVICE),), config=config)
    memory = torch.randn(64 * 64 + 1, device=DEVICE)
    odd = memory[1:].view(64, 64)
    assert odd.data_ptr() % 16
    with torch.no_grad():
        torch.testing.assert_close(stitched(odd), model(odd))
        if not inside:
            stitched.capture([64], progress=False)
            torch.testing.assert_close(stitched(odd), model(odd))
