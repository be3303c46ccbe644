"""Inductor's own graph partition: the same results as cutting the graph before it, and a hook that is always put back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch._inductor import utils as inductor_utils

import piecework
from piecework.errors import ConfigError, SplitError
from piecework.runtime import torch_compat
from piecework.runtime.backend import PieceworkBackend
from piecework.runtime.compilers import InductorStandaloneAdaptor
from piecework.runtime.config import CompilationConfig


@piecework.splitting_op("partition_test::mix", mutates_args=("out",))
def mix(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor, name: str) -> None:
    out.copy_(left - 2 * right)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.ModuleList(nn.Linear(8, 16) for _ in range(2))
        self.leave = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index, enter in enumerate(self.enter):
            left, right = enter(x).chunk(2, -1)
            out = torch.empty_like(left)
            mix(left, right, out, f"layers.{index}")
            x = x + self.leave(out)
        return x


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


@pytest.mark.inductor
def test_with_a_wrapper_set_the_hook_is_put_back_and_results_are_the_same() -> None:
    model, x = Model(), torch.randn(4, 8)
    backend = PieceworkBackend(INSIDE)
    compiler = backend.compiler_manager.compiler
    assert isinstance(compiler, InductorStandaloneAdaptor)
    compiler.wrap_partition = keep
    before = current_hook()
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
    assert current_hook() is before


def test_the_hook_reaches_the_wrapper_with_its_place() -> None:
    calls: list[tuple[int, int]] = []

    def wrap(function: Callable[..., object], index: int, count: int) -> Callable[..., object]:
        calls.append((index, count))
        return lambda: ("wrapped", function())

    with torch_compat.partition_wrapper(wrap) as possible:
        assert possible
        place = inductor_utils.CUDAGraphWrapperMetadata(num_partitions=3, partition_index=1)
        assert current_hook()(lambda: "ran", place)() == ("wrapped", "ran")  # type: ignore[operator]
    assert calls == [(1, 3)]


def test_the_hook_is_put_back_after_an_exception_and_when_nested() -> None:
    before = current_hook()
    with torch_compat.partition_wrapper(keep):
        outer = current_hook()
        with pytest.raises(RuntimeError, match="no"), torch_compat.partition_wrapper(keep):
            assert current_hook() is not outer
            raise RuntimeError("no")
        assert current_hook() is outer
    assert current_hook() is before


def test_a_failing_compilation_puts_the_hook_back() -> None:
    compiler = InductorStandaloneAdaptor(INSIDE)
    compiler.wrap_partition = keep
    before = current_hook()
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_function(torch.ops.aten.mm.default, (x, x)),))
    broken = torch.fx.GraphModule(torch.nn.Module(), graph)
    with pytest.raises(Exception, match=r"mm|dim|matrices|2"):
        compiler.compile(broken, [torch.randn(3)], INSIDE, None)
    assert current_hook() is before


def test_splitting_ops_given_to_the_call_reach_inductor() -> None:
    backend = PieceworkBackend(
        CompilationConfig(use_inductor_graph_partition=True), splitting_ops=[mix]
    )
    options = backend.compiler_manager.compiler.options_for(None)  # type: ignore[attr-defined]
    assert options["custom_should_partition_ops"] == ["partition_test::mix"]
    assert options["graph_partition"] is True


def test_an_unknown_splitting_op_is_an_error_here_too() -> None:
    config = INSIDE.replace(splitting_ops=["partition_test::mixx"])
    with pytest.raises(SplitError, match="partition_test::mixx"):
        piecework.compile(Model(), (torch.randn(4, 8),), config=config)


def test_without_the_hook_wrapping_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(inductor_utils, "set_customized_partition_wrappers")
    compiler = InductorStandaloneAdaptor(INSIDE)
    compiler.wrap_partition = keep
    with pytest.raises(ConfigError, match="can't wrap"), compiler.partitions_wrapped():
        pass
