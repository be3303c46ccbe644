"""The wrapper and the forward context as peers have them: in, calls under a mode and a descriptor; out, capture, replay or neither."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager

import pytest
import torch
from torch import nn

from piecework.errors import ConfigError, InputError, StaticGraphError
from piecework.runtime import (
    BatchDescriptor,
    CudagraphDispatcher,
    CUDAGraphMode,
    CUDAGraphWrapper,
    ForwardContext,
    get_forward_context,
    set_forward_context,
)
from piecework.runtime.graphs.memory.owner import StaticGraphs
from piecework.runtime.graphs.plan.phase import frozen_garbage

NONE, PIECEWISE, FULL = CUDAGraphMode.NONE, CUDAGraphMode.PIECEWISE, CUDAGraphMode.FULL


@pytest.fixture(autouse=True, scope="module")
def imports_are_no_garbage() -> Iterator[None]:
    with frozen_garbage():
        yield


class Seen(nn.Module):
    """A linear layer that counts how often its Python runs. The CPU's stand-in of a graph runs it at a replay too."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.linear(x)


def captured(wrapper: CUDAGraphWrapper) -> dict[int, torch.Tensor]:
    """The static outputs of what was captured, by number of tokens; a warm-up has none."""
    return {
        key.num_tokens: entry.output
        for key, entry in wrapper.concrete_cudagraph_entries.items()
        if entry.call is not None and isinstance(entry.output, torch.Tensor)
    }


def is_replay(wrapper: CUDAGraphWrapper, out: object) -> bool:
    """Whether a result lies in the memory of a captured graph."""
    assert isinstance(out, torch.Tensor)
    return any(out.data_ptr() == static.data_ptr() for static in captured(wrapper).values())


def under(mode: CUDAGraphMode, tokens: int) -> AbstractContextManager[ForwardContext]:
    return set_forward_context(
        cudagraph_runtime_mode=mode, batch_descriptor=BatchDescriptor(tokens)
    )


class Bench:
    """A wrapped model, the owner of its graphs, and one input in memory that stays."""

    def __init__(self, mode: CUDAGraphMode = FULL, policy: str = "copy") -> None:
        self.model = Seen()
        self.graphs = StaticGraphs("cpu", address_policy=policy)
        self.graphs.addresses.register_weights(dict(self.model.named_parameters()))
        self.x = torch.randn(8, 4)
        self.graphs.addresses.register_persistent("x", self.x)
        self.wrapper = CUDAGraphWrapper(self.model, None, mode, graphs=self.graphs)

    @torch.no_grad()
    def call(self, mode: CUDAGraphMode, x: torch.Tensor, tokens: int | None = None) -> torch.Tensor:
        with under(mode, len(x) if tokens is None else tokens):
            found = self.wrapper(x)
        assert isinstance(found, torch.Tensor)
        return found

    def capture(self, mode: CUDAGraphMode, x: torch.Tensor) -> torch.Tensor:
        with self.graphs.capturing():
            return self.call(mode, x)


@torch.no_grad()
def test_it_captures_once_and_replays_after() -> None:
    bench = Bench()
    bench.capture(FULL, bench.x)
    assert list(captured(bench.wrapper)) == [8]
    bench.x.fill_(0.5)
    out = bench.call(FULL, bench.x)
    assert is_replay(bench.wrapper, out) and len(bench.graphs.records) == 1
    torch.testing.assert_close(out, bench.model.linear(bench.x))


@pytest.mark.parametrize("mode", [PIECEWISE, NONE])
def test_another_mode_passes_it_by(mode: CUDAGraphMode) -> None:
    bench = Bench()
    with bench.graphs.capturing():
        bench.call(mode, bench.x)
    assert bench.model.calls == 1
    assert not captured(bench.wrapper) and bench.graphs.records == []


def test_capture_replay_and_bypass_follow_the_dispatcher() -> None:
    bench = Bench()
    dispatcher = CudagraphDispatcher(FULL, [1, 2], max_num_seqs=8)

    def step(size: int) -> str:
        mode, key = dispatcher.dispatch(size)
        before = len(bench.graphs.records)
        with (
            torch.no_grad(),
            set_forward_context(cudagraph_runtime_mode=mode, batch_descriptor=key),
        ):
            out = bench.wrapper(bench.x[:size])
        if len(bench.graphs.records) > before:
            return "capture"
        return "replay" if is_replay(bench.wrapper, out) else "bypass"

    with bench.graphs.capturing():
        assert [step(1), step(2)] == ["capture", "capture"]
    assert [step(1), step(2), step(3)] == ["replay", "replay", "bypass"]


def test_an_unseen_shape_is_not_captured_once_the_phase_is_over() -> None:
    bench = Bench()
    bench.capture(FULL, bench.x)
    with pytest.raises(StaticGraphError, match="outside the capture phase"):
        bench.call(FULL, bench.x[:3])


@torch.no_grad()
def test_a_piecewise_wrapper_in_a_full_one() -> None:
    graphs = StaticGraphs("cpu")
    x, model = torch.randn(2, 4), Seen()
    graphs.addresses.register_weights(dict(model.named_parameters()))
    graphs.addresses.register_persistent("x", x)
    inner = CUDAGraphWrapper(model, None, PIECEWISE, graphs=graphs, name="inner")
    outer = CUDAGraphWrapper(lambda x: inner(x), None, FULL, graphs=graphs, name="outer")
    with graphs.capturing(), under(FULL, 2):
        outer(x)
    assert [record.name for record in graphs.records] == ["outer"]
    with under(FULL, 2):
        assert is_replay(outer, outer(x))
    with graphs.capturing(), under(PIECEWISE, 2):
        outer(x)
    assert [record.name for record in graphs.records] == ["outer", "inner"]
    with under(PIECEWISE, 2):  # outer passes by, inner replays
        assert is_replay(inner, outer(x))


def test_an_input_that_stays_where_it_was_replays() -> None:
    bench = Bench(PIECEWISE, "refuse")
    bench.capture(PIECEWISE, bench.x)
    bench.x.normal_()
    torch.testing.assert_close(bench.call(PIECEWISE, bench.x), bench.model.linear(bench.x).detach())


def test_an_input_that_moved_is_refused() -> None:
    bench = Bench(PIECEWISE, "refuse")
    bench.capture(PIECEWISE, bench.x)
    with pytest.raises(StaticGraphError):
        bench.call(PIECEWISE, bench.x.clone())


def test_an_input_that_moved_is_copied_by_default() -> None:
    bench = Bench(PIECEWISE)
    other = torch.randn(8, 4)
    bench.capture(PIECEWISE, other)
    moved = torch.randn(8, 4)
    torch.testing.assert_close(bench.call(PIECEWISE, moved), bench.model.linear(moved).detach())


def test_entries_appear_with_a_capture_and_not_before() -> None:
    bench = Bench(PIECEWISE)
    assert not captured(bench.wrapper)
    bench.call(NONE, bench.x)
    assert not captured(bench.wrapper)
    bench.capture(PIECEWISE, bench.x)
    assert list(captured(bench.wrapper)) == [8]


def test_a_call_without_a_descriptor_or_mode_runs_as_it_is() -> None:
    bench = Bench()
    with torch.no_grad():
        torch.testing.assert_close(bench.wrapper(bench.x), bench.model.linear(bench.x))
    assert bench.graphs.records == []


def test_the_output_of_a_replay_lies_where_the_capture_put_it() -> None:
    bench = Bench()
    bench.capture(FULL, bench.x)
    (static,) = captured(bench.wrapper).values()
    assert bench.call(FULL, bench.x).data_ptr() == static.data_ptr()


def test_a_failed_capture_leaves_no_graph_and_can_be_tried_again() -> None:
    bench = Bench()

    def failing(x: torch.Tensor) -> torch.Tensor:
        raise ValueError("capture failed")

    bench.wrapper.runnable = failing
    with pytest.raises(StaticGraphError, match="capture failed"):
        bench.capture(FULL, bench.x)
    assert bench.graphs.records == [] and not bench.graphs.is_open
    bench.wrapper.runnable = bench.model
    bench.capture(FULL, bench.x)
    assert len(bench.graphs.records) == 1


def test_clearing_forgets_every_graph() -> None:
    bench = Bench()
    bench.capture(FULL, bench.x)
    bench.capture(FULL, bench.x[:2])
    bench.graphs.clear_all_graphs()
    assert not bench.wrapper.concrete_cudagraph_entries and bench.graphs.nbytes == 0
    with pytest.raises(StaticGraphError, match="outside the capture phase"):
        bench.call(FULL, bench.x)


def test_a_graph_that_can_not_be_reset_keeps_no_other_one() -> None:
    class Stuck:
        def reset(self) -> None:
            raise RuntimeError("reset failed")

    bench = Bench()
    other = CUDAGraphWrapper(bench.model, None, FULL, graphs=bench.graphs)
    for tokens in (8, 2):
        bench.capture(FULL, bench.x[:tokens])
        with torch.no_grad(), bench.graphs.capturing(), under(FULL, tokens):
            other(bench.x[:tokens])
    entry = bench.wrapper.concrete_cudagraph_entries[BatchDescriptor(8)]
    entry.call = Stuck()  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="reset failed"):
        bench.graphs.clear_all_graphs()
    assert not captured(bench.wrapper) and not captured(other)
    assert (bench.graphs.records, bench.graphs.nbytes) == ([], 0)


def test_what_is_wrapped_can_be_reached_through_nested_wrappers() -> None:
    model, graphs = Seen(), StaticGraphs("cpu")
    inner = CUDAGraphWrapper(model, None, PIECEWISE, graphs=graphs)
    outer = CUDAGraphWrapper(inner, None, FULL, graphs=graphs)
    assert inner.runnable is model and outer.runnable is inner


def test_an_unknown_mode_is_an_error() -> None:
    with pytest.raises(ConfigError, match="replay"):
        CUDAGraphMode.parse("replay")


# --- the forward context -------------------------------------------------------------------------------


def current_mode() -> CUDAGraphMode | None:
    """The mode of the context that is set; None where none is, which asking for it makes an error."""
    try:
        return get_forward_context().cudagraph_runtime_mode
    except InputError:
        return None


def test_a_context_is_seen_inside_and_gone_after() -> None:
    assert current_mode() is None
    with under(FULL, 4):
        assert current_mode() is FULL
    assert current_mode() is None


def test_a_context_is_gone_after_an_exception() -> None:
    with pytest.raises(RuntimeError, match="on purpose"), under(FULL, 4):
        raise RuntimeError("on purpose")
    assert current_mode() is None


def test_the_inner_of_two_contexts_is_seen_and_the_outer_after_it() -> None:
    with under(FULL, 4):
        with under(PIECEWISE, 2):
            assert current_mode() is PIECEWISE
        assert current_mode() is FULL


def test_another_thread_sees_no_capture_of_this_one() -> None:
    seen: list[object] = []
    with under(FULL, 4):
        thread = threading.Thread(target=lambda: seen.append(current_mode()))
        thread.start()
        thread.join()
    assert seen == [None]


def test_a_capture_inside_a_capture_is_an_error() -> None:
    graphs, x = StaticGraphs("cpu"), torch.zeros(4)
    inner = CUDAGraphWrapper(lambda x: x + 1, None, FULL, graphs=graphs)
    outer = CUDAGraphWrapper(lambda x: inner(x), None, FULL, graphs=graphs)
    with graphs.capturing(), under(FULL, 4), pytest.raises(StaticGraphError, match="inside"):
        outer(x)
