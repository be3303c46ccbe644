"""Nodes that are alike are looked at once for what they write: only where everything that could decide it is the same."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from models import EAGER, mix
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import piecework
from piecework.runtime.analysis.writes import mutations_in, written_inputs

Given = tuple[object, ...]


def graph_of(target: Callable[..., object], calls: list[Given]) -> torch.fx.GraphModule:
    """A graph that calls ``target`` with each of ``calls``; each tensor is a placeholder, a tensor given twice is one."""
    graph = torch.fx.Graph()
    nodes: dict[int, torch.fx.Node] = {}
    for each in (value for call in calls for value in call):
        if isinstance(each, torch.Tensor) and id(each) not in nodes:
            nodes[id(each)] = graph.placeholder(f"x{len(nodes)}")
            nodes[id(each)].meta["example_value"] = each
    for call in calls:
        graph.call_function(target, tuple(nodes.get(id(each), each) for each in call))
    graph.output(())
    return torch.fx.GraphModule(nn.Module(), graph)


class Writes:
    """Adds to its first argument where ``test`` says so; looks like a function of torch's."""

    def __init__(self, test: Callable[..., bool], module: str = "torch.nn.functional") -> None:
        self.calls = 0

        def function(*args: object) -> object:
            self.calls += 1
            return args[0].add_(1) if test(*args) else args[0] + 1  # type: ignore[attr-defined, operator]

        function.__module__ = module
        self.function = function


def in_one_memory(x: torch.Tensor, y: torch.Tensor) -> bool:
    return x.untyped_storage()._cdata == y.untyped_storage()._cdata


def pairs() -> dict[str, tuple[Callable[..., bool], Given, Given]]:
    """What the function asks, arguments with which it only reads, and arguments that differ from them in one thing."""
    x, y = torch.empty(4, 4), torch.empty(4, 4)
    return {
        "dtype": (lambda x: x.dtype is torch.float64, (x,), (x.double(),)),
        "strides": (lambda x: x.stride() == (1, 4), (x,), (y.t(),)),
        "sizes": (lambda x: x.shape[1] == 3, (x[:, :2],), (y[:, :3],)),
        "offset": (lambda x: x.storage_offset() == 4, (x[:2],), (y[1:3],)),
        "memory shared": (in_one_memory, (x, torch.empty(4, 4)), (y, y.view(4, 4))),
        "bytes behind it": (
            lambda x: x.untyped_storage().nbytes() == 128,
            (x,),
            (torch.empty(8, 4)[:4],),
        ),
        "conjugate": (
            lambda x: x.is_conj(),
            (torch.empty(4, dtype=torch.complex64),),
            (torch.empty(4, dtype=torch.complex64).conj(),),
        ),
        "number": (lambda x, n: n == 2, (x, 1), (y, 2)),
        "truth": (lambda x, n: n is True, (x, 1), (y, True)),
        "sign of zero": (lambda x, n: math.copysign(1, n) < 0, (x, 0.0), (y, -0.0)),
        "text": (lambda x, n: n == "b", (x, "a"), (y, "b")),
        "list or tuple": (lambda x, n: type(n) is tuple, (x, [1]), (y, (1,))),
    }


@pytest.mark.parametrize("turned", [False, True], ids=["reading first", "writing first"])
@pytest.mark.parametrize("name", pairs())
def test_what_differs_in_one_thing_is_looked_at_by_itself(name: str, turned: bool) -> None:
    with FakeTensorMode():
        test, reads, writes = pairs()[name]
        calls = [writes, reads] if turned else [reads, writes]
        graph = graph_of(Writes(test).function, calls)
    values = [node.meta["example_value"] for node in graph.graph.find_nodes(op="placeholder")]
    memory = writes[0].untyped_storage()._cdata  # type: ignore[attr-defined]
    expected = {n for n, each in enumerate(values) if each.untyped_storage()._cdata == memory}
    assert written_inputs(graph) == expected


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


def test_nodes_that_are_alike_are_looked_at_once() -> None:
    with FakeTensorMode():
        calls: list[Given] = [(torch.empty(4), 1) for _ in range(5)]
        seen = Writes(lambda x, n: True)
        assert written_inputs(graph_of(seen.function, calls)) == {0, 1, 2, 3, 4}
        assert seen.calls == 1
        # A function that could be anybody's may do something else each time.
        own = Writes(lambda x, n: True, "somebody")
        assert written_inputs(graph_of(own.function, calls)) == {0, 1, 2, 3, 4}
        assert own.calls == 5


def test_values_that_are_known_are_looked_at_each_time() -> None:
    """A fake tensor may carry its value, and code may ask for it."""
    seen = Writes(lambda x, n: n.item() == 2)
    with FakeTensorMode():
        one, two = torch.tensor(1), torch.tensor(2)
        graph = graph_of(seen.function, [(torch.empty(4), one), (torch.empty(4), two)])
    assert (int(one.constant), int(two.constant)) == (1, 2)
    assert 2 in written_inputs(graph)
    assert seen.calls == 2


class Layer(nn.Module):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.number = number
        self.register_buffer(
            "state", torch.zeros(8, dtype=(torch.float32, torch.float64)[number % 2])
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        if self.number != 2:
            self.state.add_(1)
        y = y + self.state.float()
        out = torch.empty_like(y)
        mix(y, out)
        return out


def test_layers_together_write_what_each_writes_alone() -> None:
    model = nn.Sequential(*map(Layer, range(5)), nn.Linear(8, 8))
    x = torch.randn(4, 8)
    torch._dynamo.mark_dynamic(x, 0)
    stitched = piecework.compile(model, (x,), config=EAGER)
    bound = {row.name: row.path for row in stitched.source.module.bound}
    pieces = [piece.name for piece in stitched.pieces]
    together = mutations_in(stitched.split_gm, pieces, bound)
    alone = [each for name in pieces for each in mutations_in(stitched.split_gm, [name], bound)]
    assert together == tuple(alone)
    assert {each.path for each in together} == {f"{n}.state" for n in (0, 1, 3, 4)}
