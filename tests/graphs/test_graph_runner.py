"""A loop that serves captured graphs, as an engine writes it: any size in, the right rows out, whatever was captured."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from piecework.errors import InputError, StaticGraphError
from piecework.runtime.batch.coverage import coverage
from piecework.runtime.batch.dispatcher import CudagraphDispatcher
from piecework.runtime.batch.forward_context import get_forward_context, set_forward_context
from piecework.runtime.batch.mode import CUDAGraphMode
from piecework.runtime.graphs.memory.owner import StaticGraphs
from piecework.runtime.graphs.memory.wrapper import CUDAGraphWrapper
from piecework.runtime.graphs.plan.estimate import estimate_memory, fit_budget
from piecework.runtime.graphs.plan.phase import capture_graphs, frozen_garbage
from piecework.runtime.graphs.stage.inputs import InputSpec, StaticInputs

FULL = CUDAGraphMode.FULL


@pytest.fixture(autouse=True, scope="module")
def imports_are_no_garbage():
    """Captures collect garbage; without this each would walk through all of torch."""
    with frozen_garbage():
        yield


def model(x, positions):
    rows = x * 2 + positions.float().sum(0)[:, None]
    return {"rows": rows, "columns": rows.t(), "total": torch.ones(16), "n": 7}


class Served:
    """Dispatch, stage, run, trim: the parts that docs/static-graphs.md puts together."""

    def __init__(self, sizes=(2, 4, 8), forward=model):
        self.graphs = StaticGraphs("cpu")
        self.inputs = StaticInputs.allocate(
            {"x": torch.zeros(1, 64), "positions": torch.zeros(2, 1, dtype=torch.long)},
            max(sizes),
            [InputSpec("positions", 1, 5)],
            poison=True,
        )
        self.inputs.register(self.graphs.addresses)
        self.forward = CUDAGraphWrapper(forward, None, FULL, graphs=self.graphs)
        self.dispatcher = CudagraphDispatcher(FULL, sizes, max_num_seqs=max(sizes))

    def dummy(self, descriptor):
        return self.forward(*self.inputs.views(descriptor.num_tokens))

    def estimate(self):
        return estimate_memory(self.dummy, self.dispatcher.get_capture_descs(), self.graphs)

    def capture(self, **options):
        keys = self.dispatcher.get_capture_descs()
        return capture_graphs(self.dummy, keys, self.graphs, dispatcher=self.dispatcher, **options)

    def __call__(self, *tensors, **context):
        count = self.inputs.batch_size(tensors)
        mode, descriptor = self.dispatcher.dispatch(count)
        if mode is not CUDAGraphMode.NONE:
            tensors = self.inputs.stage(tensors, descriptor.num_tokens)
        with set_forward_context(
            cudagraph_runtime_mode=mode, batch_descriptor=descriptor, **context
        ):
            out = self.forward(*tensors)
        if not isinstance(out, dict):
            return out
        return {**out, "rows": out["rows"][:count], "columns": out["columns"][:, :count]}


def batch(n):
    return torch.randn(n, 64), torch.randint(0, 9, (2, n))


@settings(deadline=None, max_examples=30)
@given(
    st.sets(st.integers(1, 8), min_size=1, max_size=4),
    st.lists(st.integers(1, 10), min_size=1, max_size=6),
)
def test_every_batch(sizes, batches):
    served = Served(sizes)
    served.capture()
    for n in batches:
        x, positions = batch(n)
        got, want = served(x, positions), model(x, positions)
        for name in ("rows", "columns", "total"):
            torch.testing.assert_close(got[name], want[name])
        assert got["n"] == 7


def test_the_context_reaches_the_model():
    def forward(x, positions):
        context = get_forward_context()
        return x + 1, context.attn_metadata, context.state.get("cache")

    served = Served(forward=forward)
    x, positions = batch(9)
    out = served(x, positions, attn_metadata="seen", state={"cache": "kept"})
    assert out[1:] == ("seen", "kept")


def test_the_context_of_dummy_runs():
    seen = []

    def context_for(mode, descriptor):
        return set_forward_context(
            "dummy", cudagraph_runtime_mode=mode, batch_descriptor=descriptor
        )

    def forward(x, positions):
        seen.append(get_forward_context().attn_metadata)
        return x + 1

    Served((4,), forward).capture(warmups=1, context_for=context_for)
    assert set(seen) == {"dummy"}


def test_a_budget():
    served = Served((1, 2, 4, 8))
    estimate = served.estimate()
    dropped = fit_budget(estimate, served.dispatcher, estimate.total // 2)
    report = served.capture()
    assert dropped and report.nbytes <= estimate.total // 2
    assert len(report.captured) + len(dropped) == 4
    assert coverage(served.dispatcher, 9)[-1].last == 9
    for n in range(1, 10):
        x, positions = batch(n)
        torch.testing.assert_close(served(x, positions)["rows"], model(x, positions)["rows"])


def test_without_a_capture_phase_serving_says_so():
    served = Served()
    with pytest.raises(StaticGraphError, match="FULL capture outside the capture phase"):
        served(*batch(3))
    x, positions = batch(9)
    assert torch.equal(served(x, positions)["rows"], model(x, positions)["rows"])


def test_inputs_that_disagree():
    served = Served()
    x, positions = batch(3)
    with pytest.raises(InputError, match=r"no common batch size \(x: 3, positions: 2\)"):
        served(x, positions[:, :2])
    with pytest.raises(InputError, match="positions: not a tensor of that rank"):
        served(x, positions[0])
    with pytest.raises(InputError, match="1 tensors for 2 staged inputs"):
        served(x)
