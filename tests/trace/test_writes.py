"""What graphs write to: found by schema and memory, once for nodes that are alike; in captured pieces refused by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from models import EAGER, mix
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

import piecework
from piecework.errors import StaticGraphError
from piecework.runtime.config.compilation import CompilationConfig
from piecework.runtime.pieces.backend import PieceworkBackend
from piecework.runtime.trace.writes import Mutation, mutations_in, written_inputs

CAPTURED = CompilationConfig(backend="eager", cudagraph_mode="PIECEWISE")


@torch.library.custom_op("mutation::advance", mutates_args=("counter",))
def advance(counter: torch.Tensor, by: torch.Tensor) -> None:
    counter.add_(by.sum())


@advance.register_fake
def _(counter: torch.Tensor, by: torch.Tensor) -> None:
    return None


class Model(nn.Module):
    """Runs one statement on its buffer, then cuts."""

    def __init__(self, statement: Callable[[nn.Module, torch.Tensor], object]) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.inner = nn.Module()
        self.inner.register_buffer("state", torch.zeros(8))
        self._statement = [statement]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        got = self._statement[0](self.inner, y)
        out = torch.empty_like(y)
        mix(y, out)
        return out if got is None else out + got


def found_in(model: nn.Module) -> tuple[Mutation, ...]:
    x = torch.randn(4, 8)
    torch._dynamo.mark_dynamic(x, 0)
    stitched = piecework.compile(model, (x,), config=EAGER)
    pieces = [piece.name for piece in stitched.pieces]
    bound = {row.name: row.path for row in stitched.source.module.bound}
    return mutations_in(stitched.split_gm, pieces, bound)


def assign_item(module: nn.Module, y: torch.Tensor) -> None:
    module.state[0] = 1.0


def through_out(module: nn.Module, y: torch.Tensor) -> None:
    torch.add(module.state, 1.0, out=module.state)


def augmented(module: nn.Module, y: torch.Tensor) -> None:
    module.state += 1


def foreach(module: nn.Module, y: torch.Tensor) -> None:
    torch._foreach_add_([module.state], 1.0)


@pytest.mark.parametrize(
    ("statement", "op"),
    [
        (lambda module, y: module.state.add_(1).sum(), "aten.add_"),
        (lambda module, y: module.state[2:4].mul_(2).sum(), "aten.mul_"),
        (lambda module, y: module.state.view(2, 4)[0].copy_(y[0, :4]).sum(), "aten.copy_"),
        (lambda module, y: functional.relu(module.state, inplace=True), "aten.relu_"),
        (lambda module, y: functional.dropout(module.state, 0.5, True, True), "aten.mul_"),
        (
            lambda module, y: module.state.index_copy_(0, torch.arange(2), y[0, :2]),
            "aten.index_copy_",
        ),
        (lambda module, y: advance(module.state, y), "mutation.advance"),
        (assign_item, "aten.fill_" if hasattr(torch.compiler, "precompile") else "aten.copy_"),
        (through_out, "aten.add.out"),
        (augmented, "aten.add_"),
        (foreach, "aten._foreach_add_"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_write_is_found_whatever_form_it_has(
    statement: Callable[[nn.Module, torch.Tensor], object], op: str
) -> None:
    found = found_in(Model(statement))
    assert found and {each.path for each in found} == {"inner.state"}
    assert any(op in each.op for each in found), found
    assert {each.piece for each in found} == {"submod_0"}
    assert all("test_writes.py:" in each.where for each in found)


@pytest.mark.parametrize(
    "statement",
    [
        lambda module, y: module.state.clone().add_(1),
        lambda module, y: y.add_(module.state),
        lambda module, y: torch.cat([module.state, y[0]]).mul_(2).sum(),
        lambda module, y: torch.empty(8).copy_(module.state),
    ],
)
def test_reading_a_buffer_is_no_write(
    statement: Callable[[nn.Module, torch.Tensor], object],
) -> None:
    assert found_in(Model(statement)) == ()


class WritesInSplittingOp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("out", torch.zeros(4, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        mix(y[:4], self.out)
        return self.out + y[:4]


def branches(module: nn.Module, y: torch.Tensor) -> object:
    def left(y: torch.Tensor) -> torch.Tensor:
        return y + module.state

    def right(y: torch.Tensor) -> torch.Tensor:
        return y - module.state

    return torch.cond(y.sum() > 0, left, right, (y,))


def test_a_write_in_a_splitting_op_is_outside_the_pieces_and_a_branch_that_reads_is_none() -> None:
    assert found_in(Model(branches)) == ()
    assert found_in(WritesInSplittingOp()) == ()
    piecework.compile(WritesInSplittingOp(), (torch.randn(6, 8),), config=CAPTURED)


def test_capturing_such_a_piece_is_refused_before_anything_is_compiled() -> None:
    model = Model(lambda module, y: module.state.add_(1).sum())
    refused = pytest.raises(
        StaticGraphError,
        match=r"aten\.add_.* writes to inner\.state inside captured piece submod_0",
    )
    with refused as caught, piecework.counters.expect(num_backend_compilations=0):
        piecework.compile(model, (torch.randn(4, 8),), config=CAPTURED)
    assert "test_writes.py:" in str(caught.value) and "splitting_op" in str(caught.value)
    assert not model.inner.state.any()


def test_the_dynamo_backend_refuses_it_too() -> None:
    model = Model(lambda module, y: module.state.add_(1).sum())
    compiled = torch.compile(model, backend=PieceworkBackend(CAPTURED), fullgraph=True)
    with pytest.raises(Exception, match=r"writes to .*state"):
        compiled(torch.randn(4, 8))


def test_looking_leaves_the_recorded_values_alone() -> None:
    model = Model(lambda module, y: module.state.view(2, 4).t_().sum())
    stitched = piecework.compile(model, (torch.randn(4, 8),), config=EAGER)
    nodes = [n for n in stitched.split_gm.submod_0.graph.nodes if "example_value" in n.meta]
    before = [getattr(n.meta["example_value"], "shape", None) for n in nodes]
    bound = {row.name: row.path for row in stitched.source.module.bound}
    first = mutations_in(stitched.split_gm, ["submod_0"], bound)
    assert first == mutations_in(stitched.split_gm, ["submod_0"], bound)
    assert [getattr(n.meta["example_value"], "shape", None) for n in nodes] == before


# --- nodes that are alike -----------------------------------------------------------------------------


def test_a_write_is_said_of_the_memory_of_each_node() -> None:
    """One operator with the same literals: the first writes to fresh memory, the others each to another input."""
    graph = torch.fx.Graph()
    with FakeTensorMode():
        a, b, c = (torch.empty(4) for _ in range(3))
        given = [graph.placeholder(name) for name in "abc"]
        for node, value in zip(given, (a, b, c), strict=True):
            node.meta["example_value"] = value
        views = [torch.empty(4), b.view(4), c.view(4)]
    for view in views:
        node = graph.call_method("view", (given[0], 4))
        node.meta["example_value"] = view
        graph.call_function(torch.ops.aten.add.out, (given[0], 1), {"out": node})
    graph.output(())
    assert written_inputs(torch.fx.GraphModule(nn.Module(), graph)) == {1, 2}


def test_literals_tell_nodes_apart() -> None:
    """The same function on arguments of one kind, which writes where a literal says so."""
    calls: list[object] = []

    def function(x: torch.Tensor, inplace: bool) -> torch.Tensor:
        calls.append(inplace)
        return x.add_(1) if inplace else x + 1

    graph = torch.fx.Graph()
    with FakeTensorMode():
        for number in range(6):
            node = graph.placeholder(f"x{number}")
            node.meta["example_value"] = torch.empty(4)
            graph.call_function(function, (node, number % 2 == 1))
    graph.output(())
    assert written_inputs(torch.fx.GraphModule(nn.Module(), graph)) == {1, 3, 5}
    assert calls == [False, True]
