"""Every kind of node and argument that FX runs: emitted source gives the same results, aliases and mutations."""

from __future__ import annotations

import dataclasses
import enum
import functools
import math
import operator
from collections import namedtuple
from collections.abc import Callable

import pytest
import torch
import torch.fx
from fx_graphs import callable_graph_of, dynamo_graph_of, graph_of, module_of, problems

from piecework.codegen import (
    LowerOptions,
    StitchedSource,
    compile_execution_fn,
    generate_source,
    verify,
)
from piecework.codegen.plan.render import format_source
from piecework.errors import EmitError, UnsupportedNode

Args = tuple[object, ...]
Pair = namedtuple("Pair", ["left", "right"])


def same(
    gm: torch.fx.GraphModule, *inputs: Args, options: LowerOptions | None = None
) -> StitchedSource:
    """Emit ``gm`` and require what the interpreter does."""
    source = generate_source(gm, options)
    assert format_source(source.code) == source.code
    assert problems(gm, source, *inputs) == [], source.code
    return source


X = torch.arange(12.0).reshape(4, 3)


# --- functions -----------------------------------------------------------------------------------


def test_a_function_of_an_importable_module_is_imported() -> None:
    build = lambda g, x: g.call_function(functools.reduce, (operator.add, [x, x]))  # noqa: E731
    source = same(graph_of(build), (X,))
    assert "import functools" in source.code and "import operator" not in source.code


@pytest.mark.parametrize(
    "target",
    [
        *(torch.nn.functional.gelu, torch._C._nn.gelu, torch.ops.aten.gelu),
        *(torch.ops.aten.gelu.default, torch.Tensor.relu, torch.special.expit, torch.fft.fft),
    ],
)
def test_torch_functions_of_every_namespace(target: Callable[..., object]) -> None:
    same(graph_of(lambda g, x: g.call_function(target, (x,))), (X,))


# --- arguments -----------------------------------------------------------------------------------


class Level(enum.IntEnum):
    LOW = 1


class Word(enum.StrEnum):
    A = "a"


class Subclassed(int):
    def __repr__(self) -> str:
        return "__import__('os').abort()"


def types_of(*args: object, **kwargs: object) -> list[object]:
    return [(type(each).__name__, each) for each in (*args, *kwargs.values())]


@pytest.mark.parametrize(
    "value",
    [math.inf, -math.inf, math.nan, Level.LOW, Word.A, Subclassed(3), torch.float16, torch.device("cpu"), torch.strided,
     torch.channels_last, torch.Size([1, 2]), range(4), frozenset({1}), Pair(1, 2), 10**1500, complex(math.nan, 0),
     complex(-0.0, 1), complex(0.0, -1.0), complex(1, -0.0), -0.0, bytearray(b"x"), NotImplemented, int, Level, torch.Tensor, print, "\udc80", b"\xff"],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_values_arrive_as_they_are(value: object) -> None:
    def build(g: torch.fx.Graph, x: torch.fx.Node) -> object:
        return g.call_function(types_of, (value, [value, (value,)]), {"key": {"k": value}})

    gm = graph_of(build, "x")
    source = generate_source(gm)
    function = compile_execution_fn(source.code, {}, [], source.consts)
    (kind, arrived), _, (_, nested) = function(X)  # type: ignore[misc]
    value = next(n for n in gm.graph.nodes if n.op == "call_function").args[0]  # as FX took it
    assert kind == type(value).__name__
    if type(value) in (float, complex):
        assert repr(arrived) == repr(value)
    else:
        assert arrived == value or arrived is value
    assert repr(nested["k"]) == repr(value)


def test_a_returned_list_that_somebody_keeps_is_not_unpacked_early() -> None:
    kept: list[torch.Tensor] = [X, X]

    def give(x: torch.Tensor) -> list[torch.Tensor]:
        kept[:] = [x, x + 1]
        return kept

    def change(x: torch.Tensor) -> None:
        kept[0] = x * 100

    def build(g: torch.fx.Graph, x: torch.fx.Node) -> object:
        made = g.call_function(give, (x,))
        made.meta["example_value"] = [X, X]
        g.call_function(change, (x,))
        return (g.call_function(operator.getitem, (made, 0)),)

    same(graph_of(build), (X,))


# --- calls of graph modules ----------------------------------------------------------------------


def two_calls(g: torch.fx.Graph, a: torch.fx.Node, b: torch.fx.Node) -> object:
    return (g.call_function(torch.add, (a, b)), g.call_function(torch.sub, (a, b)))


def test_an_attribute_that_is_computed_at_each_reading_is_refused() -> None:
    root = torch.nn.Module()
    root.linear = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(3, 3))
    gm = graph_of(lambda g, x: (x, g.get_attr("linear.weight")), "x", root=root)
    with pytest.raises(
        UnsupportedNode, match=r"'linear.weight', which is another object at each.*%linear_weight"
    ):
        generate_source(gm)


def lengths(g: torch.fx.Graph, a: torch.fx.Node, *more: torch.fx.Node) -> object:
    return (*(g.call_function(len, (each,)) for each in more), a)


def hooked() -> torch.fx.GraphModule:
    gm = callable_graph_of(two_calls, "a", "b")
    gm.register_forward_hook(lambda module, args, output: (output[1], output[0]))
    return gm


def with_its_own_forward() -> torch.fx.GraphModule:
    gm = callable_graph_of(two_calls, "a", "b")
    gm.forward = lambda a, b: (a, a)
    return gm


@pytest.mark.parametrize(
    ("inner", "args", "kwargs", "text"),
    [
        (callable_graph_of(two_calls, "a", "b"), (), {"b": 2, "a": "x"}, "inner(x, 2)"),
        # What follows is called as it is.
        (callable_graph_of(lengths, "a", ("b", [1, 2])), ("x",), {}, "__vllm_submods__[0](x)"),
        (
            callable_graph_of(lengths, "a", "*rest", "**options"),
            *(("x", 1, 2), {"k": 3}, "__vllm_submods__[0](x, 1, 2, k=3)"),
        ),
        (hooked(), ("x", 1), {}, "__vllm_submods__[0](x, 1)"),
        (with_its_own_forward(), ("x", 1), {}, "__vllm_submods__[0](x, 1)"),
    ],
    ids=["keywords in any order", "a default container", "stars", "hooks", "its own forward"],
)
def test_how_a_graph_is_called(
    inner: torch.fx.GraphModule, args: Args, kwargs: dict[str, object], text: str
) -> None:
    def build(g: torch.fx.Graph, x: torch.fx.Node) -> object:
        given = tuple(x if each == "x" else each for each in args)
        named = {key: x if each == "x" else each for key, each in kwargs.items()}
        return (g.call_module("inner", given, named), x)

    gm = graph_of(build, root=torch.nn.ModuleDict({"inner": inner}))
    assert text in same(gm, (X,)).code


def test_a_container_passed_to_a_single_call_stays_one_object() -> None:
    def add_to(items: list[object], same_items: list[object]) -> list[object]:
        items.append(len(same_items))
        return [items, same_items]

    inner = callable_graph_of(lambda g, a: g.call_function(add_to, (a, a)), "a")

    def build(g: torch.fx.Graph, x: torch.fx.Node) -> object:
        made = g.call_function(list, ((x,),))
        return g.call_module("inner", (made,))

    root = torch.nn.ModuleDict({"inner": inner})
    same(graph_of(build, root=root), (X,))
    literal = graph_of(lambda g, x: g.call_module("inner", ({"k": x},)), root=root)
    with pytest.raises(AttributeError):  # a dict has no append; but it is one dict, not two
        torch.fx.Interpreter(literal).run(X)
    assert "inner({" in generate_source(literal).code


def test_literals_that_differ_become_parameters_and_equal_ones_stay() -> None:
    def layer(scale: object, name: str) -> torch.fx.GraphModule:
        def build(g: torch.fx.Graph, a: torch.fx.Node) -> object:
            scaled = g.call_function(torch.mul, (a, scale))
            shown = g.call_function(types_of, (name, 7, None), {"layer": name})
            g.call_function(setattr, (scaled, "layer_name", name))
            return (scaled, shown)

        return callable_graph_of(build, "a")

    scales = enumerate((1, 2, 2.0, True))
    layers = {f"layer_{number}": layer(scale, f"layers.{number}") for number, scale in scales}

    def build(g: torch.fx.Graph, x: torch.fx.Node) -> object:
        return [g.call_module(name, (x,)) for name in layers]

    source = same(graph_of(build, root=torch.nn.ModuleDict(layers)), (X,))
    assert source.code.count("def layer_") == 3  # int, float and bool are not one program
    assert "7, None" in source.code


@pytest.mark.parametrize("meta_inside", [True, False])
def test_a_result_that_a_graph_hands_on_is_unpacked_by_its_caller(meta_inside: bool) -> None:
    def build(g: torch.fx.Graph, a: torch.fx.Node, b: torch.fx.Node) -> object:
        parts = g.call_method("chunk", (g.call_function(torch.add, (a, b)), 2))
        if meta_inside:
            parts.meta["example_value"] = (X, X)
        return parts

    def passing(g: torch.fx.Graph, a: torch.fx.Node) -> object:
        call = g.call_module("inner", (a, 1))
        call.meta["example_value"] = (X, X)
        return call

    inner = torch.nn.ModuleDict({"inner": graph_of(build, "a", "b")})
    middle = graph_of(passing, "a", root=inner)

    def outer(g: torch.fx.Graph, x: torch.fx.Node) -> object:
        made = g.call_module("middle", (x,))
        picked = [g.call_function(operator.getitem, (made, index)) for index in (1, 0)]
        return (picked, g.call_function(torch.neg, (picked[0],)))

    source = same(graph_of(outer, root=torch.nn.ModuleDict({"middle": middle})), (X,))
    assert "getitem_1, getitem = middle(x)" in source.code


# --- higher-order operators and regions, as Dynamo captures them ---------------------------------


def _cond(x: torch.Tensor) -> torch.Tensor:
    return torch.cond(x.sum() > 0, lambda x: x.sin() + 1, lambda x: x.cos(), (x,))


def _nested_cond(x: torch.Tensor) -> torch.Tensor:
    def inner(x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.max() > 3, lambda x: x + 1, lambda x: x - 1, (x,))

    return torch.cond(x.sum() > 0, inner, lambda x: x * 2, (x,))


def _while(x: torch.Tensor) -> torch.Tensor:
    from torch._higher_order_ops.while_loop import while_loop

    return while_loop(lambda n, x: n < 3, lambda n, x: (n + 1, x * 2), (torch.tensor(0), x))[1]


def _flex(x: torch.Tensor) -> torch.Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    q = x.reshape(1, 1, 4, 3).repeat(1, 2, 1, 6)[..., :16]
    return flex_attention(q, q, q, score_mod=lambda score, b, h, i, j: score + (i - j))


def _autocast(x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = x @ x.t()
    return y.float() @ x


def _no_grad(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        y = x.sin()
    return y + x


@pytest.mark.parametrize("function", [_cond, _nested_cond, _while, _flex, _autocast, _no_grad])
def test_higher_order_operators_and_regions(
    function: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    same(dynamo_graph_of(function, X.clone()), (X,), (-X,))


# --- signatures and outputs ----------------------------------------------------------------------


def test_a_graph_without_an_output_returns_none() -> None:
    graph = torch.fx.Graph()
    graph.call_method("add_", (graph.placeholder("x"), 1))
    source = generate_source(module_of(graph))
    x = X.clone()
    assert compile_execution_fn(source.code, {}, [], source.consts)(x) is None
    assert x[0, 0] == 1


def test_nodes_after_the_output_do_not_run() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    out = graph.output(x)
    with graph.inserting_after(out):
        graph.call_method("add_", (x, 1))
    assert "add_" not in same(module_of(graph), (X,)).code


@dataclasses.dataclass(frozen=True)
class Plain:
    value: int


@pytest.mark.parametrize(
    "output",
    [lambda x: None, lambda x: (), lambda x: [], lambda x: {}, lambda x: (x,), lambda x: Pair(x, None), lambda x: {"a": {"b": [x, (x,)]}},
     lambda x: [slice(0, 3, None)], lambda x: 5, lambda x: "text", lambda x: -0.0, lambda x: 1 - 2j, lambda x: -3, lambda x: ..., lambda x: Pair((), [Pair(x, 1)]),
     lambda x: Plain(3), lambda x: torch.float16, lambda x: math.inf, lambda x: b"'\"", lambda x: "'\"", lambda x: (x, x)],
)  # fmt: skip
def test_every_form_of_output(output: Callable[[torch.fx.Node], object]) -> None:
    same(graph_of(lambda g, x: output(x)), (X,))


def test_defaults_stay_defaults() -> None:
    given = (("b", None), ("c", -1.5), ("d", math.inf), ("e", "'"), ("f", (1, [2])))
    gm = graph_of(lambda g, a, *rest: (a, list(rest)), "a", *given)
    same(gm, (X,), (X, 1), (X, 1, 2, 3, 4, 5))


def test_star_arguments_arrive_as_python_gives_them() -> None:
    def build(g: torch.fx.Graph, a: torch.fx.Node, *more: torch.fx.Node) -> object:
        return (a, g.call_function(types_of, more))

    gm = callable_graph_of(build, "a", "*rest", "**options")
    source = generate_source(gm)
    function = compile_execution_fn(source.code, {}, [], source.consts)
    assert function(1, 2, 3, k=4) == gm(1, 2, 3, k=4)


def test_equal_layers_with_subgraphs_of_their_own_share_a_function() -> None:
    """A branch is a constant; two branches that are the same program are the same constant."""

    def branch(function: Callable[..., object]) -> torch.fx.GraphModule:
        return callable_graph_of(lambda g, a: (g.call_function(function, (a,)),), "a")

    def build(g: torch.fx.Graph, x: torch.fx.Node) -> object:
        positive = g.call_method("gt", (g.call_method("sum", (x,)), 0))
        branches = g.create_node("get_attr", "yes"), g.create_node("get_attr", "no")
        chosen = g.call_function(torch.ops.higher_order.cond, (positive, *branches, (x,)))
        return (g.call_function(operator.getitem, (chosen, 0)), chosen)

    def layer(first: Callable[..., object]) -> torch.fx.GraphModule:
        branches = {"yes": branch(first), "no": branch(torch.cos)}
        return graph_of(build, root=torch.nn.ModuleDict(branches))

    layers = {"one": layer(torch.sin), "two": layer(torch.sin), "other": layer(torch.tanh)}
    root = torch.nn.ModuleDict(layers)
    gm = graph_of(lambda g, x: [g.call_module(name, (x,)) for name in layers], root=root)
    source = same(gm, (X,), (-X,))
    assert source.code.count("def ") == 3 and "shared by 2 submodules" in source.code
    # What a branch does is part of the proof.
    consts = list(source.consts)
    at = next(i for i, value in enumerate(consts) if value is layers["one"].yes)
    consts[at] = branch(torch.tan)
    with pytest.raises(EmitError, match="differs from the graph"):
        verify(dataclasses.replace(source, consts=tuple(consts)), gm)


def test_a_value_that_a_written_out_submodule_does_not_read_dies_before_it() -> None:
    inner = graph_of(lambda g, x, unused: g.call_function(torch.sin, (x,)), "x", "unused")
    gm = graph_of(
        lambda g, x: g.call_module("inner", (x, g.call_function(torch.relu, (x,)))),
        root=torch.nn.ModuleDict({"inner": inner}),
    )
    lines = [each.strip() for each in generate_source(gm).code.splitlines()]
    (died,) = (n for n, line in enumerate(lines) if line == "del relu")
    (called_at,) = (n for n, line in enumerate(lines) if "= sin(x)" in line)
    assert died < called_at
