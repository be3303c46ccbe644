"""What only a GPU shows: graphs, pools, memory and the staging kernel on CUDA. Everything else runs on the CPU too."""

from __future__ import annotations

import pytest
import torch
from gpu_models import EAGER, assert_alike, stitched_decoder
from hand_captured import HandCaptured

from piecework.errors import StaticGraphError
from piecework.runtime.batch.mode import CUDAGraphMode
from piecework.runtime.graphs.plan.phase import estimate_memory
from piecework.runtime.graphs.stage.inputs import InputSpec, StaticInputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

HIDDEN = 256
SIZES = (1, 2, 4, 8, 16, 32)


def by_hand(mode, policy, layers=4, sizes=SIZES):
    """Pieces around an attention stand-in, on the GPU."""
    made = {"policy": policy, "layers": layers, "fresh": policy == "copy"}
    return HandCaptured(mode, sizes, **made, warmups=1, hidden=HIDDEN, device="cuda")


@pytest.mark.parametrize("policy", ["copy", "refuse", "eager"])
@pytest.mark.parametrize("mode", ["PIECEWISE", "FULL", "FULL_AND_PIECEWISE", "FULL_DECODE_ONLY"])
@torch.no_grad()
def test_every_size_equals_the_plain_model(mode, policy):
    model = by_hand(CUDAGraphMode.parse(mode), policy)
    report = model.capture(warmups=1)
    assert all(outcome.captured and not outcome.eager for outcome in report.outcomes)
    model.check_all(model.largest, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_the_memory_estimate():
    model = by_hand(CUDAGraphMode.PIECEWISE, "refuse", layers=8, sizes=tuple(range(8, 257, 8)))
    estimate = estimate_memory(
        model.dummy, model.dispatcher.get_capture_descs(), model.graphs, warmups=1
    )
    actual = model.capture(warmups=1).nbytes
    assert estimate.total == pytest.approx(actual, rel=0.1)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.int64, torch.int32, torch.bool]
)
def test_the_kernel_equals_the_reference(dtype):
    specs = [InputSpec("a", 0, 1), InputSpec("b", 1, 1), InputSpec("c", -1, 0)]
    shapes = [(1, 3), (5, 1, 2), (2, 2, 1)]
    examples = {
        spec.name: torch.zeros(shape, dtype=dtype, device="cuda")
        for spec, shape in zip(specs, shapes, strict=True)
    }
    kernel, reference = (
        StaticInputs.allocate(examples, 64, specs, kernel=kind) for kind in ("triton", "reference")
    )
    for count, padded in [(0, 1), (1, 1), (3, 8), (64, 64), (17, 64)]:
        tensors = []
        for spec, shape in zip(specs, shapes, strict=True):
            size = list(shape)
            size[spec.dim] = count
            tensors.append((torch.rand(size, device="cuda") * 9).to(dtype))
        assert kernel._launcher.fits(tensors)
        for one, other in zip(
            kernel.stage(tensors, padded), reference.stage(tensors, padded), strict=True
        ):
            assert torch.equal(one, other)


@torch.no_grad()
def test_pinned_memory_may_be_written_again_once_it_is_staged():
    """The copy would otherwise wait behind the work that is queued, and read the next batch."""
    busy = torch.randn(4096, 4096, device="cuda")
    inputs = StaticInputs.allocate({"x": torch.zeros(1, 1024, device="cuda")}, 1024)
    pinned = torch.ones(1024, 1024).pin_memory()
    for _ in range(20):
        busy = busy @ busy * 1e-3
    (staged,) = inputs.stage([pinned], 1024)
    pinned.fill_(2)
    assert bool((staged == 1).all())


def test_a_pool_of_the_callers_that_takes_the_memory_of_captures_is_refused():
    model, stitched = stitched_decoder(EAGER)
    pool = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(pool), pytest.raises(StaticGraphError, match="use_mem_pool"):
        stitched.capture([4, 8], progress=False, estimate=False)
    stitched.capture([4, 8], progress=False, estimate=False)
    assert_alike(stitched, model, (3, 4, 8))
