"""Inductor's own graph partition: the same results as cutting the graph before it, and a hook that is always put back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from models import Block, Layers
from torch._inductor import scheduler
from torch._inductor import utils as inductor_utils

import piecework
from piecework.errors import StaticGraphError
from piecework.runtime import torch_compat
from piecework.runtime.batch.forward_context import current_forward_context, set_forward_context
from piecework.runtime.compilers.inductor import Partition, partitions_taken_by, wrap_partition
from piecework.runtime.config.compilation import CompilationConfig
from piecework.runtime.pieces.backend import PieceworkBackend


@piecework.splitting_op("partition_test::mix", mutates_args=("out",), rows="independent")
def mix(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor, name: str) -> None:
    context = current_forward_context()
    metadata = None if context is None else context.attn_metadata
    out.copy_(left - (2 if metadata is None else metadata) * right)


class Model(Layers):
    def __init__(self) -> None:
        super().__init__(Block(mix, f"layers.{index}") for index in range(2))


INSIDE = CompilationConfig(use_inductor_graph_partition=True, splitting_ops=["partition_test::mix"])


def keep(function: Callable[..., object], index: int, count: int) -> Callable[..., object]:
    return function


def current_hook() -> object:
    return inductor_utils._unstable_customized_partition_wrapper.wrapper


@pytest.mark.inductor
def test_the_results_are_those_of_cutting_before() -> None:
    model, x = Model(), torch.randn(4, 8)
    inside = piecework.compile(model, (x,), config=INSIDE)
    before = piecework.compile(
        model, (x,), config=INSIDE.replace(use_inductor_graph_partition=False)
    )
    assert (inside.report().pieces, inside.report().splitting) == (1, 0)
    assert (before.report().pieces, before.report().splitting) == (3, 2)
    for batch in (4, 9):
        x = torch.randn(batch, 8)
        torch.testing.assert_close(inside(x), before(x))
        torch.testing.assert_close(inside(x), model(x))


def test_the_hook_is_put_back_after_an_exception_and_when_nested() -> None:
    before = current_hook()
    with torch_compat.partition_wrapper(keep):
        outer = current_hook()
        with pytest.raises(RuntimeError, match="no"), torch_compat.partition_wrapper(keep):
            assert current_hook() is not outer
            raise RuntimeError("no")
        assert current_hook() is outer
    assert current_hook() is before


def test_splitting_ops_given_to_the_call_reach_inductor() -> None:
    inside = CompilationConfig(use_inductor_graph_partition=True)
    backend = PieceworkBackend(inside, splitting_ops=[mix])
    options = backend.compiler_manager.compiler.options_for(None)  # type: ignore[attr-defined]
    wanted = ["partition_test::mix", "piecework::partitions_are_wrapped"]
    assert options["custom_should_partition_ops"] == wanted
    assert options["graph_partition"] is True


@pytest.fixture
def partitions_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make Inductor cut CPU code as it cuts GPU code, which it would leave whole."""
    original = scheduler.Scheduler.should_partition

    def should_partition(self: object, node: object) -> str | None:
        reason = original(self, node)
        return None if reason == "cpu ops" else reason

    monkeypatch.setattr(scheduler.Scheduler, "should_partition", should_partition)


PARTITIONS = 3  # before, between and after two splitting ops
# Inductor's cache can't know of the fixture: an option that does no harm keeps what is compiled under it apart.
CUT = INSIDE.replace(inductor_compile_config={"comprehensive_padding": False})


@pytest.mark.inductor
@pytest.mark.usefixtures("partitions_on_the_cpu")
def test_each_partition_replays_and_the_ops_between_run_live(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    model, x = Model(), torch.randn(4, 8)
    stitched = piecework.compile(model, (x,), config=CUT)
    sizes = (1, 2, 4, 8)
    with piecework.counters.expect(num_cudagraph_captured=PARTITIONS * len(sizes)):
        stitched.capture(sizes, progress=False)
    names = {record.name for record in stitched.static_graphs.graphs.records}
    assert names == {f"partition {index} of {PARTITIONS}" for index in range(PARTITIONS)}
    assert all(r.staged_bytes == 0 for r in stitched.static_graphs.graphs.records)
    with torch.no_grad(), piecework.counters.expect(num_cudagraph_captured=0):
        for batch in (1, 2, 3, 4, 5, 8, 11):
            x = torch.randn(batch, 8)
            torch.testing.assert_close(stitched(x), model(x))
            with set_forward_context(5):  # request state is read at each call, not at the capture
                torch.testing.assert_close(stitched(x), model(x))
    modes = {row.last: row.mode.name for row in stitched.coverage()}
    assert modes == dict.fromkeys(sizes, "PIECEWISE") | {9: "NONE"}
    assert stitched.memory_report().total > 0
    with pytest.raises(StaticGraphError, match="no replay source"):
        stitched.static_graphs.source_for(4)
    ran: list[int] = []
    original = Partition.__call__

    def count(self: Partition, args: list[object]) -> object:
        ran.append(self.index)
        return original(self, args)

    monkeypatch.setattr(Partition, "__call__", count)
    x = torch.randn(4, 8)
    expected = model(x)
    torch.testing.assert_close(stitched(x), expected)
    assert ran == [0, 1, 2]
    wrappers = stitched.static_graphs.partitions.values()  # type: ignore[attr-defined]
    for call in (e for w in wrappers for e in w.concrete_cudagraph_entries.values()):
        call.replay = lambda: None
    torch.testing.assert_close(stitched(torch.randn(4, 8)), expected)  # nothing else computes


@pytest.mark.inductor
def test_without_partitions_capturing_is_an_error_and_the_model_still_runs() -> None:
    model, x = Model(), torch.randn(4, 8)
    stitched = piecework.compile(model, (x,), config=INSIDE)
    with pytest.raises(StaticGraphError, match="made no partitions"):
        stitched.capture([4], progress=False)
    with torch.no_grad():
        torch.testing.assert_close(stitched(x), model(x))


def test_a_partition_that_two_models_share_is_run_by_the_one_that_runs() -> None:
    class Taker:
        def __init__(self) -> None:
            self.seen: list[tuple[object, ...]] = []

        def run_partition(self, partition: Partition, values: tuple[object, ...]) -> object:
            self.seen.append(values)
            return partition.run(*values)

    def generated(args: list[int]) -> tuple[int, ...]:
        taken = tuple(args)
        args.clear()
        return (sum(taken),)

    partition = wrap_partition(generated, 0, 1)
    assert wrap_partition(partition, 0, 1) is partition  # Inductor keeps one module per text
    first, second = Taker(), Taker()
    args = [1, 2]
    assert partition(args) == (3,) and args == []
    with partitions_taken_by(first):
        args = [3, 4]
        assert partition(args) == (7,) and args == []
        with partitions_taken_by(second):
            assert partition([5]) == (5,)
        assert partition([6]) == (6,)
    assert (first.seen, second.seen) == ([(3, 4), (6,)], [(5,)])
    assert partition([7]) == (7,)
