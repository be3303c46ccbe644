"""``capture(sizes, mode=…)``: every mode, adapters, decode batches and speculation, served equal to the model at every size."""

from __future__ import annotations

import re

import pytest
import torch
from captured import calls, captured
from models import EAGER, fresh, mix_pair
from torch import nn

import piecework
from piecework.errors import StaticGraphError
from piecework.runtime.batch.forward_context import current_forward_context, set_forward_context
from piecework.runtime.graphs import BatchDescriptor, BatchKind, CUDAGraphMode, FailurePolicy

NONE, PIECEWISE, FULL = CUDAGraphMode.NONE, CUDAGraphMode.PIECEWISE, CUDAGraphMode.FULL
DECODE = BatchKind(uniform_decode=True)


@piecework.splitting_op("capture_modes::adapted", rows="independent")
def adapted(x: torch.Tensor) -> torch.Tensor:
    """Adds the number of adapters that the context says, as kernels launched for that many would."""
    context = current_forward_context()
    descriptor = None if context is None else context.batch_descriptor
    if context is not None and context.batch is not None:
        return x + context.batch.num_active_loras
    return x + (0 if descriptor is None else descriptor.num_active_loras)


@piecework.splitting_op("capture_modes::uncapturable", rows="independent")
def uncapturable(x: torch.Tensor) -> torch.Tensor:
    context = current_forward_context()
    if context is not None and context.cudagraph_runtime_mode is FULL:
        raise RuntimeError("this kernel synchronizes")
    return x * 1


for each in (adapted, uncapturable):
    each.register_fake(torch.empty_like)


class Model(nn.Module):
    def __init__(self, op=fresh) -> None:
        super().__init__()
        self.first, self.second, self.op = nn.Linear(8, 8), nn.Linear(8, 8), op

    def forward(self, x: torch.Tensor, positions: torch.Tensor):
        y = self.first(x) + positions[:, None]
        out = torch.empty_like(y)
        mix_pair(y, y + 1, out)
        return self.second(self.op(out)) + x, positions * 2


def batch(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, 8), torch.arange(n)


def captured_model(op=fresh, sizes=(2, 4), **options):
    model = Model(op).requires_grad_(False)
    return model, captured(model, *batch(5), sizes=sizes, unbacked=True, **options)


def served(stitched, args, kind: BatchKind | None = None):
    with set_forward_context(batch=kind):
        return stitched(*args)


# --- modes -----------------------------------------------------------------------------------------

# mode → what a plain batch and a decode batch of a captured size run as
MODES = {
    "PIECEWISE": (PIECEWISE, PIECEWISE),
    "FULL": (FULL, FULL),
    "FULL_DECODE_ONLY": (NONE, FULL),
    "FULL_AND_PIECEWISE": (PIECEWISE, FULL),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_size_of_every_kind_equals_the_model(mode: str) -> None:
    model, stitched = captured_model(sizes=(1, 2, 4, 8), mode=mode)
    plain, decode = MODES[mode]
    for kind, expected in ((None, plain), (BatchKind(), plain), (DECODE, decode)):
        for n in range(1, 11):
            args = batch(n)
            torch.testing.assert_close(served(stitched, args, kind), model(*args))
            found = stitched.static_graphs.dispatcher.explain(n, kind or BatchKind())
            assert found.mode is (expected if n <= 8 else NONE)
    modes = {mode for mode, _ in stitched.static_graphs.replays}
    assert modes == {plain, decode} - {NONE}
    # each call is counted as what the dispatcher says
    counts = calls(stitched, "mode")
    assert sum(counts.values()) == 30
    assert counts.get("FULL", 0) == 8 * [plain, plain, decode].count(FULL)


def test_an_op_that_can_not_be_captured_fails_by_policy() -> None:
    with pytest.raises(StaticGraphError, match=r"this kernel synchronizes") as raised:
        captured_model(uncapturable, mode="FULL")
    assert "(the whole forward, FULL tokens=4 reqs=4)" in str(raised.value)
    assert isinstance(raised.value.__cause__, RuntimeError)
    told = {"mode": "FULL_AND_PIECEWISE", "on_failure": FailurePolicy.UNCAPTURED}
    model, stitched = captured_model(uncapturable, **told)
    for kind in (None, DECODE):
        args = batch(3)
        torch.testing.assert_close(served(stitched, args, kind), model(*args))
    assert {mode for mode, _ in stitched.static_graphs.replays} == {PIECEWISE}


# --- who says what runs ----------------------------------------------------------------------------


def test_a_caller_that_dispatched_by_itself_is_obeyed() -> None:
    model, stitched = captured_model(mode="FULL_AND_PIECEWISE")
    dispatcher = stitched.static_graphs.dispatcher
    args = batch(3)
    expected = model(*args)
    for uniform in (False, True):
        mode, descriptor = dispatcher.dispatch(3, uniform)
        with set_forward_context(cudagraph_runtime_mode=mode, batch_descriptor=descriptor):
            torch.testing.assert_close(stitched(*args), expected)
    with set_forward_context(batch_descriptor=BatchDescriptor(3)):
        torch.testing.assert_close(stitched(*args), expected)
    rows = {(row.mode, row.reason) for row in stitched.call_report()}
    assert rows == {
        ("PIECEWISE", "the forward context chose it"),
        ("FULL", "the forward context chose it"),
        ("NONE", "the forward context says mode NONE for this descriptor"),
    }
    for wrong, why in ((BatchDescriptor(8), "is not captured"), (BatchDescriptor(2), "a batch of")):
        scope = set_forward_context(cudagraph_runtime_mode=PIECEWISE, batch_descriptor=wrong)
        with scope, pytest.raises(StaticGraphError, match=why):
            stitched(*args)


class Turned(nn.Module):
    """A piece that no compiler is trusted with for every size at once: a batch of one has a trace of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        mix_pair(y, y + 1, out := torch.empty_like(y))
        return out.t().contiguous().t() * 2


def test_dispatch_asks_the_trace_that_serves_a_size() -> None:
    model = Turned().requires_grad_(False)
    stitched = piecework.compile(model, (torch.randn(4, 8),), config={"backend": "eager"})
    assert stitched.dispatch(3) == (NONE, BatchDescriptor(3))
    stitched.capture([1, 2, 4], mode="FULL_AND_PIECEWISE", progress=False, estimate=False)
    assert len(stitched.traces) == 2
    for n, padded in ((1, 1), (2, 2), (3, 4), (4, 4), (5, 5)):
        for uniform in (False, True):
            mode, shape = stitched.dispatch(n, uniform)
            assert shape.num_tokens == padded and (mode is NONE) == (n == 5)
            assert (mode is FULL) == (uniform and n < 5)
            x = torch.randn(n, 8)
            with set_forward_context(cudagraph_runtime_mode=mode, batch_descriptor=shape):
                torch.testing.assert_close(stitched(x), model(x))
    assert stitched.dispatch(1, invalid_modes=[PIECEWISE]) == (NONE, BatchDescriptor(1))
    model.first.weight = nn.Parameter(torch.randn(8, 8), requires_grad=False)
    stitched.rebind()  # gives the graphs up
    assert stitched.dispatch(1)[0] is stitched.dispatch(4)[0] is NONE


# --- adapters, decode batches, speculation, further axes -------------------------------------------


@pytest.mark.parametrize("specialize", [True, False])
@pytest.mark.parametrize("mode", ["PIECEWISE", "FULL_AND_PIECEWISE"])
def test_adapters_have_graphs_of_their_own(mode: str, specialize: bool) -> None:
    config = EAGER.replace(cudagraph_specialize_lora=specialize)
    model, stitched = captured_model(adapted, config=config, mode=mode, lora_counts=(1, 3))
    keys = stitched.static_graphs.replays
    cases = {(key.has_lora, key.num_active_loras) for _, key in keys}
    assert cases == {(True, 1), (True, 3)} | ({(False, 0)} if specialize else set())
    for loras in (0, 1, 2, 3):
        for n in (1, 3, 4):
            args = batch(n)
            kind = BatchKind(has_lora=loras > 0, num_active_loras=loras)
            with set_forward_context(batch=kind):
                torch.testing.assert_close(stitched(*args), model(*args))
    # more adapters than any graph was captured for: uncaptured, and said so
    args = batch(2)
    with set_forward_context(batch=BatchKind(has_lora=True, num_active_loras=4)):
        torch.testing.assert_close(stitched(*args), model(*args))
    assert "no graph is captured for this many adapters" in calls(stitched)


# --- replay source of a full graph -----------------------------------------------------------------


def test_the_text_of_a_full_graph_is_stage_replay_return() -> None:
    _, stitched = captured_model(sizes=[4], mode="FULL")
    code = stitched.static_graphs.source_for(4).code
    assert "graphs: FULL tokens=4" in code
    body = [
        line.strip()
        for line in code[code.index("def replay(") :].splitlines()[1:]
        if line.strip() and not line.strip().startswith("#")
    ]
    assert body[:2] == ["stage(inputs)", "replay_0()"]
    assert re.fullmatch(r"return \(\w+, \w+\)", body[2]) and len(body) == 3
    assert "__vllm_submods__" not in code
