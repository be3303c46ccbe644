"""What makes two graphs one program: names don't count, everything that changes what runs does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.fx
from fx_graphs import graph_of, problems

from piecework.codegen import generate_source
from piecework.codegen.graph.structure import Structure, input_signature, structure_of


def of(build: Callable[..., object], *names: str, open_literals: bool = False) -> Structure:
    return structure_of(graph_of(build, *names), open_literals=open_literals)


def call(target: Callable[..., object], *more: object, **kwargs: object) -> Callable[..., object]:
    return lambda g, x: g.call_function(target, (x, *more), kwargs)


def test_names_do_not_count() -> None:
    assert of(call(torch.sin), "a").key == of(call(torch.sin), "b").key


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (call(torch.sin), call(torch.cos)),
        (call(torch.add, 1), call(torch.add, True)),
        (call(torch.add, 0.0), call(torch.add, -0.0)),
        (call(torch.add, 1), call(torch.add, 1.0)),
        (call(torch.sum, dim=0, keepdim=True), call(torch.sum, keepdim=True, dim=0)),
        (call(torch.sin), lambda g, x: g.call_method("sin", (x,))),
        (call(len), lambda g, x: g.call_function(len, ("%0",))),
        (lambda g, x: g.call_function(len, ([x],)), lambda g, x: g.call_function(len, ((x,),))),
        (lambda g, x: (x, x), lambda g, x: [x, x]),
        (lambda g, x: x, lambda g, x: None),
    ],
)
def test_what_runs_counts(one: Callable[..., object], two: Callable[..., object]) -> None:
    assert of(one).key != of(two).key
    assert of(one).key == of(one).key


def test_open_literals_are_holes_and_their_types_are_not() -> None:
    one = of(call(torch.add, 1, alpha=2), open_literals=True)
    two = of(call(torch.add, 3, alpha=4), open_literals=True)
    assert one.key == two.key and [hole.value for hole in two.holes] == [3, 4]
    assert [(hole.argument, hole.ordinal) for hole in one.holes] == [("1", 0), ("alpha", 1)]
    other = of(call(torch.add, 3.0, alpha=4), open_literals=True)
    assert other.key != one.key


def test_the_number_of_results_counts() -> None:
    def build(count: int) -> Callable[..., object]:
        def chunked(g: torch.fx.Graph, x: torch.fx.Node) -> object:
            parts = g.call_method("chunk", (x, 2))
            parts.meta["example_value"] = tuple(torch.empty(1) for _ in range(count))
            return parts

        return chunked

    assert of(build(2)).key != of(build(3)).key


def test_inputs_count_as_they_are_described() -> None:
    one, two = graph_of(lambda g, x: x), graph_of(lambda g, x: x)
    for gm, dtype in ((one, torch.float32), (two, torch.float16)):
        next(iter(gm.graph.nodes)).meta["example_value"] = torch.empty(2, 3, dtype=dtype)
    assert structure_of(one).key == structure_of(two).key
    assert (
        structure_of(one, describe_input=input_signature).key
        != structure_of(two, describe_input=input_signature).key
    )


def test_tensors_that_a_graph_reads_are_told_apart_by_identity() -> None:
    def reading(weight: torch.Tensor) -> torch.fx.GraphModule:
        def build(g: torch.fx.Graph, x: torch.fx.Node) -> object:
            return g.call_function(torch.add, (x, g.create_node("get_attr", "weight")))

        root = torch.nn.ParameterDict({"weight": weight})
        return graph_of(build, root=root)

    one, two = reading(torch.ones(2)), reading(torch.ones(2))
    assert structure_of(one).key == structure_of(one).key
    assert structure_of(one).key != structure_of(two).key
    assert structure_of(one).local and not structure_of(graph_of(lambda g, x: x)).local


def test_a_graph_that_is_called_twice_returns_another_list_each_time() -> None:
    inner = graph_of(lambda g, a: (a, []), "a")
    root = torch.nn.Module()
    root.add_module("inner", inner)

    def build(g: torch.fx.Graph, x: torch.fx.Node) -> object:
        calls = [g.call_module("inner", (x,)) for _ in range(3)]
        return calls[0], calls[2]

    gm = graph_of(build, "x", root=root)
    assert problems(gm, generate_source(gm), (torch.ones(2),)) == []
