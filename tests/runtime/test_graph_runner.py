"""The serving loop over captured graphs: any size in, the right rows out, whatever was captured."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from piecework.errors import InputError, StaticGraphError
from piecework.runtime.batch.dispatcher import CudagraphDispatcher
from piecework.runtime.batch.forward_context import get_forward_context, set_forward_context
from piecework.runtime.batch.mode import CUDAGraphMode
from piecework.runtime.graphs.memory.owner import StaticGraphs
from piecework.runtime.graphs.memory.wrapper import CUDAGraphWrapper
from piecework.runtime.graphs.plan.phase import frozen_garbage
from piecework.runtime.graphs.serve.runner import GraphRunner
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


def runner(sizes=(2, 4, 8), forward=model, **options):
    graphs = StaticGraphs("cpu")
    inputs = StaticInputs.allocate(
        {"x": torch.zeros(1, 64), "positions": torch.zeros(2, 1, dtype=torch.long)},
        max(sizes),
        [InputSpec("positions", 1, 5)],
        poison=True,
    )
    options.setdefault("output_dims", (0, 1, None, None))
    return GraphRunner(
        CUDAGraphWrapper(forward, None, FULL, graphs=graphs),
        inputs,
        CudagraphDispatcher(FULL, sizes, max_num_seqs=max(sizes)),
        graphs,
        **options,
    )


def batch(n):
    return torch.randn(n, 64), torch.randint(0, 9, (2, n))


@settings(deadline=None, max_examples=30)
@given(
    st.sets(st.integers(1, 8), min_size=1, max_size=4),
    st.lists(st.integers(1, 10), min_size=1, max_size=6),
    st.booleans(),
)
def test_every_batch(sizes, batches, clone):
    served = runner(sizes, clone_outputs=clone)
    served.capture()
    kept = []
    for n in batches:
        x, positions = batch(n)
        got, want = served(x, positions), model(x, positions)
        kept.append((got, want))
        for name in ("rows", "columns", "total"):
            torch.testing.assert_close(got[name], want[name])
        assert got["n"] == 7
    if clone:
        for got, want in kept:
            torch.testing.assert_close(got["columns"], want["columns"])


def test_the_context_reaches_the_model():
    def forward(x, positions):
        context = get_forward_context()
        return x + 1, context.attn_metadata, context.state.get("cache")

    served = runner(forward=forward, output_dims=(0, None, None))
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

    served = runner((4,), forward, output_dims=None, context_for=context_for)
    served.capture(warmups=1)
    assert set(seen) == {"dummy"}


def test_a_budget():
    served = runner((1, 2, 4, 8))
    estimate = served.estimate()
    report = served.capture(budget_bytes=estimate.total // 2)
    assert report.nbytes <= estimate.total // 2
    assert served.dropped
    assert len(report.captured) + len(served.dropped) == 4
    rows = served.coverage(9)
    assert rows[-1].last == 9
    for n in range(1, 10):
        x, positions = batch(n)
        torch.testing.assert_close(served(x, positions)["rows"], model(x, positions)["rows"])
    assert runner().capture(budget_bytes=10**9).skipped == ()


def test_without_a_capture_phase_serving_says_so():
    served = runner()
    with pytest.raises(StaticGraphError, match="FULL capture outside the capture phase"):
        served(*batch(3))
    x, positions = batch(9)
    assert torch.equal(served(x, positions)["rows"], model(x, positions)["rows"])


@pytest.mark.parametrize(
    ("dims", "message"),
    [
        (None, r"output 1 has shape \[64, 4\], not 4 in dimension 0"),
        ((0, 1, 2, None), r"output 2 has shape \[16\], not 4 in dimension 2"),
        ((0, 1), "4 outputs, and batch dimensions declared for 2"),
    ],
)
def test_wrong_output_dimensions(dims, message):
    served = runner(output_dims=dims)
    served.capture()
    with pytest.raises(InputError, match=message):
        served(*batch(3))


def test_inputs_that_disagree():
    served = runner()
    x, positions = batch(3)
    with pytest.raises(InputError, match=r"no common batch size \(x: 3, positions: 2\)"):
        served(x, positions[:, :2])
    with pytest.raises(InputError, match="positions: not a tensor of that rank"):
        served(x, positions[0])
    with pytest.raises(InputError, match="1 tensors for 2 staged inputs"):
        served(x)
