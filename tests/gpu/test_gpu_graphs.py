"""What only a GPU shows: graphs, pools, memory and the staging kernel on CUDA. Everything else runs on the CPU too."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from piecework.bench.gpu.contenders import stitch
from piecework.bench.gpu.model import TINY, build, token_ids
from piecework.runtime.batch.descriptor import BatchKind
from piecework.runtime.batch.dispatcher import CudagraphDispatcher
from piecework.runtime.batch.forward_context import set_forward_context
from piecework.runtime.batch.mode import CUDAGraphMode
from piecework.runtime.graphs.memory.addresses import ValueOrigin
from piecework.runtime.graphs.memory.owner import StaticGraphs
from piecework.runtime.graphs.memory.wrapper import CUDAGraphWrapper, wrap_with_cudagraph_if_needed
from piecework.runtime.graphs.plan.estimate import estimate_memory
from piecework.runtime.graphs.plan.phase import capture_graphs
from piecework.runtime.graphs.stage.inputs import InputSpec, StaticInputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

HIDDEN = 256
SIZES = (1, 2, 4, 8, 16, 32)


class Model:
    """Pieces around an attention stand-in, on the GPU."""

    def __init__(self, mode, policy, layers=4, sizes=SIZES):
        torch.manual_seed(0)
        self.graphs = StaticGraphs("cuda", address_policy=policy)
        self.largest = max(sizes)
        self.weights = [torch.randn(HIDDEN, HIDDEN, device="cuda") / 16 for _ in range(layers)]
        self.graphs.addresses.register_weights({str(i): w for i, w in enumerate(self.weights)})
        self.inputs = StaticInputs.allocate(
            {"x": torch.zeros(1, HIDDEN, device="cuda")}, self.largest, poison=True
        )
        self.inputs.register(self.graphs.addresses)
        self.out = torch.empty(self.largest, HIDDEN, device="cuda")
        self.graphs.addresses.register_persistent("out", self.out, ValueOrigin.OUT_BUFFER)
        config = SimpleNamespace(cudagraph_mode=mode, cudagraph_num_of_warmups=1)
        self.pieces = [
            wrap_with_cudagraph_if_needed(
                self.piece,
                config,
                i == 0,
                i == layers - 1,
                graphs=self.graphs,
                name=f"submod_{2 * i}",
            )
            for i in range(layers)
        ]
        self.full = CUDAGraphWrapper(self.stitched, config, CUDAGraphMode.FULL, graphs=self.graphs)
        self.dispatcher = CudagraphDispatcher(mode, sizes, max_num_seqs=self.largest)
        self.fresh = policy == "copy"

    @staticmethod
    def piece(x, w):
        return torch.tanh(x @ w) + x

    def stitched(self, x):
        for i, (piece, w) in enumerate(zip(self.pieces, self.weights, strict=True)):
            x = piece(x, w)
            if i + 1 < len(self.pieces):
                x = x.flip(-1) if self.fresh else self._into_buffer(x)
        return x

    def _into_buffer(self, x):
        return self.out[: x.shape[0]].copy_(x.flip(-1))

    def plain(self, x):
        for i, w in enumerate(self.weights):
            x = self.piece(x, w)
            if i + 1 < len(self.weights):
                x = x.flip(-1)
        return x

    def dummy(self, descriptor):
        return self.full(*self.inputs.views(descriptor.num_tokens))

    def capture(self):
        return capture_graphs(
            self.dummy,
            self.dispatcher.get_capture_descs(),
            self.graphs,
            warmups=1,
            dispatcher=self.dispatcher,
        )

    def serve(self, rows, uniform):
        n = rows.shape[0]
        mode, descriptor = self.dispatcher.dispatch(n, uniform)
        staged = self.inputs.stage([rows], descriptor.num_tokens)
        with set_forward_context(cudagraph_runtime_mode=mode, batch_descriptor=descriptor):
            return mode, self.full(*staged)[:n].clone()


@pytest.mark.parametrize("policy", ["copy", "refuse", "eager"])
@pytest.mark.parametrize("mode", ["PIECEWISE", "FULL", "FULL_AND_PIECEWISE", "FULL_DECODE_ONLY"])
@torch.no_grad()
def test_every_size_equals_the_plain_model(mode, policy):
    model = Model(CUDAGraphMode.parse(mode), policy)
    report = model.capture()
    assert all(outcome.captured and not outcome.eager for outcome in report.outcomes)
    for n in [*range(1, model.largest + 1), 3, 1]:
        for uniform in (False, True):
            rows = torch.randn(n, HIDDEN, device="cuda")
            _, got = model.serve(rows, uniform)
            torch.testing.assert_close(got, model.plain(rows), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_the_memory_estimate():
    model = Model(CUDAGraphMode.PIECEWISE, "refuse", layers=8, sizes=tuple(range(8, 257, 8)))
    estimate = estimate_memory(
        model.dummy, model.dispatcher.get_capture_descs(), model.graphs, warmups=1
    )
    actual = model.capture().nbytes
    assert estimate.total == pytest.approx(actual, rel=0.1)


@torch.no_grad()
def test_clearing_gives_memory_back():
    model = Model(CUDAGraphMode.PIECEWISE, "refuse", layers=8)
    model.capture()
    held = torch.cuda.memory_reserved()
    model.graphs.clear_all_graphs()
    assert torch.cuda.memory_reserved() <= held
    model.capture()
    rows = torch.randn(5, HIDDEN, device="cuda")
    torch.testing.assert_close(model.serve(rows, False)[1], model.plain(rows), rtol=1e-3, atol=1e-3)


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
        assert kernel._launcher.fits(tensors, (count,) * 3)
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


@pytest.mark.parametrize("policy", ["copy", "eager"])
@pytest.mark.parametrize("mode", ["PIECEWISE", "FULL", "FULL_AND_PIECEWISE", "FULL_DECODE_ONLY"])
def test_a_compiled_model_serves_every_size(mode, policy):
    model = build(3, TINY, "cuda")
    ids = token_ids(9, TINY, "cuda")
    stitched = stitch(model, ids, "eager")
    stitched.capture([1, 2, 4, 8], mode=mode, address_policy=policy, progress=False)
    for n in range(1, 10):
        for kind in (None, BatchKind(uniform_decode=True)):
            batch = torch.randint(0, TINY.vocabulary, (n,), device="cuda")
            with torch.no_grad(), set_forward_context(batch=kind):
                torch.testing.assert_close(stitched(batch), model(batch), rtol=1e-3, atol=1e-3)
    report = stitched.memory_report()
    assert report.total > 0 and report.estimate is not None
    stitched.static_graphs.release()
    torch.testing.assert_close(stitched(ids), model(ids), rtol=1e-3, atol=1e-3)
