"""Cutting a graph: every cut keeps what the graph computes, and nothing crosses a cut that can't."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.fx
from fx_graphs import callable_graph_of, dynamo_graph_of, graph_of
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from piecework.codegen import (
    LowerOptions,
    SplitItem,
    check_op,
    compile_execution_fn,
    generate_source,
    split_graph,
)
from piecework.errors import SplitError

OPERATORS = {
    "cut": ("(Tensor x) -> Tensor", lambda x: x * 2, torch.empty_like),
    "fill": (
        "(Tensor x, Tensor(a!) out) -> ()",
        lambda x, out: (out.copy_(x + 1), None)[1],
        lambda x, out: None,
    ),
    "pair": (
        "(Tensor x) -> (Tensor, Tensor)",
        lambda x: (x + 1, x - 1),
        lambda x: (torch.empty_like(x), torch.empty_like(x)),
    ),
    "unfaked": ("(Tensor x) -> Tensor", lambda x: x * 2, None),
}
for name, (schema, body, fake) in OPERATORS.items():
    torch.library.define(f"test_split::{name}", schema)
    torch.library.impl(f"test_split::{name}", "CPU", body)
    if fake is not None:
        torch.library.register_fake(f"test_split::{name}", fake)
# Operators whose schema or fake implementation does not say what they do.
for name, body in {
    "hides": lambda x: (x.add_(1), x.clone())[1],
    "returns": lambda x: x,
    "shrinks": lambda x: x[:1].clone(),
}.items():
    made = torch.library.custom_op(
        f"test_split::{name}", body, mutates_args=(), schema="(Tensor x) -> Tensor"
    )
    made.register_fake(torch.empty_like)

CUT = torch.ops.test_split.cut.default
FILL = torch.ops.test_split.fill.default
PAIR = torch.ops.test_split.pair.default


def with_values(gm: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """A graph of one input with shapes recorded, as Dynamo would leave it."""
    FakeTensorProp(gm).propagate(torch.empty(4, 6))
    return gm


def traced(function: Callable[[torch.Tensor], object]) -> torch.fx.GraphModule:
    return with_values(torch.fx.symbolic_trace(function))


def symbolic_graph_of(function: Callable[[torch.Tensor], object]) -> torch.fx.GraphModule:
    """``function`` as Dynamo captures it with a dynamic first dimension."""
    x = torch.arange(24.0).reshape(4, 6)
    torch._dynamo.mark_dynamic(x, 0)
    return dynamo_graph_of(function, x)


def inputs_of(gm: torch.fx.GraphModule, x: torch.Tensor) -> list[object]:
    """``x`` and its number of rows, as ``gm`` takes them."""
    values = [node.meta["example_value"] for node in gm.graph.find_nodes(op="placeholder")]
    return [x if isinstance(value, torch.Tensor) else x.shape[0] for value in values]


def pieces(items: list[SplitItem]) -> list[str]:
    return ["cut" if item.is_splitting_graph else "piece" for item in items]


def run_all_ways(
    gm: torch.fx.GraphModule, split_gm: torch.fx.GraphModule, *inputs: object
) -> object:
    """The graph, the stitching graph and the emitted function agree; returns what they return."""

    def fresh() -> list[object]:
        return [each.clone() if isinstance(each, torch.Tensor) else each for each in inputs]

    expected = torch.fx.Interpreter(gm).run(*fresh())
    torch.testing.assert_close(split_gm(*fresh()), expected, rtol=0, atol=0)
    for submods in (None, [n.target for n in split_gm.graph.nodes if n.op == "call_module"]):
        source = generate_source(split_gm, LowerOptions(submods=submods))
        callables = {name: split_gm.get_submodule(name) for name in source.submod_names}
        function = compile_execution_fn(source.code, callables, source.submod_names, source.consts)
        torch.testing.assert_close(function(*fresh()), expected, rtol=0, atol=0)
    return expected


def crossing(split_gm: torch.fx.GraphModule) -> list[object]:
    """The recorded values of what goes from one submodule to another."""
    found = []
    for node in split_gm.graph.nodes:
        if node.op == "call_module":
            for source in node.all_input_nodes:
                found.append(source.meta.get("example_value", source.meta.get("val")))
    return found


# --- order and partitions ------------------------------------------------------------------------


def test_each_cut_has_its_own_submodule_and_ids_follow_the_order() -> None:
    def model(x: torch.Tensor) -> object:
        for _ in range(3):
            x = torch.sin(CUT(x))
        return (x,)

    gm = traced(model)
    split_gm, items = split_graph(gm, ["test_split::cut"])
    assert pieces(items) == ["cut", "piece"] * 3
    assert [item.graph_id for item in items] == list(range(6))
    names = [f"submod_{i}" for i in range(6)]
    assert [item.submod_name for item in items] == names
    assert [n.target for n in split_gm.graph.nodes if n.op == "call_module"] == names
    run_all_ways(gm, split_gm, torch.randn(4, 6))


def test_the_given_graph_is_not_changed() -> None:
    gm = traced(lambda x: (CUT(x.view(x.size())),))
    before = str(gm.graph)
    split_graph(gm, [CUT])
    assert str(gm.graph) == before


def test_mutations_keep_their_order_around_a_cut() -> None:
    def build(g: torch.fx.Graph, x: torch.fx.Node) -> object:
        buffer = g.call_method("clone", (x,))
        g.call_method("add_", (buffer, 1))
        g.call_function(FILL, (x, buffer))
        g.call_method("mul_", (buffer, 3))
        again = g.call_function(CUT, (buffer,))
        g.call_function(operator.setitem, (buffer, 0, -1.0))
        return (buffer, again)

    gm = with_values(callable_graph_of(build))
    split_gm, items = split_graph(gm, ["test_split::fill", "test_split::cut"])
    assert pieces(items) == ["piece", "cut", "piece", "cut", "piece"]
    order = [n.target for item in items for n in item.graph.graph.nodes if n.op.startswith("call")]
    assert order == ["clone", "add_", FILL, "mul_", CUT, operator.setitem]
    buffer, again = run_all_ways(gm, split_gm, torch.ones(4, 6))  # type: ignore[misc]
    assert again[0, 0] == 12 and buffer[0, 0] == -1 and buffer[1, 0] == 6


def test_a_getitem_follows_a_tuple_and_not_a_tensor() -> None:
    def model(x: torch.Tensor) -> object:
        pair = PAIR(x)
        other = torch.sin(x)
        return other, torch.sin(CUT(pair[0]))[0], pair[1]

    gm = traced(model)
    split_gm, items = split_graph(gm, ["test_split::cut", "test_split::pair"])
    assert pieces(items) == ["cut", "piece", "cut", "piece"]
    assert not any(isinstance(value, (tuple, list)) for value in crossing(split_gm))
    run_all_ways(gm, split_gm, torch.randn(4, 6))


def _functional_collectives() -> list[str]:
    """Those of torch's collectives that give results that have to be waited for."""
    space = "_c10d_functional::"
    known = [each for each in torch._C._dispatch_get_all_op_names() if each.startswith(space)]
    names = {each.removeprefix(space).partition(".")[0] for each in known}
    packets = {name: getattr(torch.ops._c10d_functional, name) for name in names}
    return sorted(
        name
        for name, packet in packets.items()
        if hasattr(packet, "overloads") and name != "wait_tensor"
    )


COLLECTIVES = _functional_collectives() if torch.distributed.is_available() else []


@pytest.mark.parametrize("name", COLLECTIVES)
@pytest.mark.parametrize("cut", [True, False])
def test_a_collective_is_waited_for_where_it_was_begun(name: str, cut: bool) -> None:
    collective = getattr(torch.ops._c10d_functional, name).default
    lists = "Tensor[]" in str(collective._schema).rpartition("->")[2]
    wait = torch.ops._c10d_functional.wait_tensor.default

    def build(g: torch.fx.Graph, x: torch.fx.Node) -> object:
        begun = g.call_function(collective, (g.call_function(torch.relu, (x,)), "0"))
        one = g.call_function(operator.getitem, (begun, 0)) if lists else begun
        between = g.call_function(CUT, (x,))
        return (g.call_function(torch.add, (g.call_function(wait, (one,)), between)),)

    ops = ["test_split::cut", *([f"_c10d_functional::{name}"] if cut else [])]
    _, items = split_graph(graph_of(build), ops)
    home = {node.target: item for item in items for node in item.graph.graph.nodes}
    assert home[collective] is home[wait]
    assert home[collective].is_splitting_graph == cut


def test_a_computed_index_does_not_pull_a_getitem_back() -> None:
    def build(g: torch.fx.Graph, x: torch.fx.Node) -> object:
        rows = g.call_method("unbind", (x,))
        cut = g.call_function(CUT, (x,))
        index = g.call_function(len, (g.call_method("unbind", (cut,)),))
        last = g.call_function(operator.sub, (index, 1))
        return (g.call_function(operator.getitem, (rows, last)),)

    gm = callable_graph_of(build)
    split_gm, _ = split_graph(gm, [CUT])
    run_all_ways(gm, split_gm, torch.randn(4, 6))


# --- sizes across a cut --------------------------------------------------------------------------


def _emptied(x: torch.Tensor) -> torch.Tensor:
    y = torch.ops.test_split.cut(x)
    out = torch.empty(size=x.size())
    return out.copy_(y) + 1


def _made_before(x: torch.Tensor) -> torch.Tensor:
    shape = torch.Size((x.shape[0], 2, 3))
    return torch.ops.test_split.cut(x * 2).view(shape) + torch.zeros(shape)


def _product_of_made(x: torch.Tensor) -> torch.Tensor:
    shape = torch.Size((x.shape[0], 6))
    y = torch.ops.test_split.cut(x)
    return y * shape.numel() + shape[0]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: CUT(x)[: x.shape[0]] + 1,
        lambda x: torch.reshape(CUT(x).view(-1), x.size()) + 1,
        lambda x: torch.full(x.size(), 2.0) + CUT(x),
        lambda x: CUT(x.view(-1)).view(*x.size()) + 1,
        lambda x: CUT(x).reshape(*x.shape[:-1], 2, 3) + 1,
        *(_emptied, _made_before, _product_of_made),
    ],
    ids=["sliced", "reshaped", "filled", "splat", "part", "emptied", "made before", "product"],
)
def test_sizes_cross_a_cut_one_by_one(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    gm = symbolic_graph_of(function)
    split_gm, items = split_graph(gm, ["test_split::cut"])
    assert "cut" in pieces(items)
    for value in crossing(split_gm):
        assert value is None or isinstance(value, (torch.Tensor, int, torch.SymInt)), value
    for rows in (4, 7):
        x = torch.arange(6.0 * rows).reshape(rows, 6)
        result = run_all_ways(gm, split_gm, *inputs_of(gm, x))
        torch.testing.assert_close(result[0], function(x))  # type: ignore[index]


def test_a_consumer_that_needs_the_whole_shape_reads_it_again() -> None:
    def build(g: torch.fx.Graph, x: torch.fx.Node) -> object:
        x.meta["example_value"] = torch.empty(4, 6, device="meta")
        shape = g.call_method("size", (x,))
        y = g.call_function(CUT, (x,))
        return (g.call_method("numel", (shape,)), y)

    gm = callable_graph_of(build)
    split_gm, _ = split_graph(gm, [CUT])
    assert run_all_ways(gm, split_gm, torch.randn(4, 6))[0] == 24  # type: ignore[index]


# --- pieces with nothing to launch ---------------------------------------------------------------


@pytest.mark.parametrize("where", ["first", "between", "last"])
def test_views_alone_are_no_piece(where: str) -> None:
    """They stay beside the splitting op, on whichever side it is, also with sizes that are computed for them."""

    def function(x: torch.Tensor) -> torch.Tensor:
        rows = x.shape[0]
        x = x + 1 if where != "first" else x.view(rows * 2, -1)
        x = torch.ops.test_split.cut(x)
        if where == "between":
            x = x.view(rows, 2, 3).transpose(1, 2)[:, 1:]
        x = torch.ops.test_split.cut(x)
        return x.view(rows // 2, -1).split(2, dim=-1)[0] if where == "last" else x * 2

    gm = symbolic_graph_of(function)
    split_gm, items = split_graph(gm, ["test_split::cut"])
    expected = {
        "first": ["cut", "cut", "piece"],
        "between": ["piece", "cut", "cut", "cut", "piece"],
        "last": ["piece", "cut", "cut"],
    }
    assert pieces(items) == expected[where]
    for rows in (4, 6):
        x = torch.arange(rows * 6.0).reshape(rows, 6)
        run_all_ways(gm, split_gm, *inputs_of(gm, x))


@pytest.mark.parametrize(
    "copies", [lambda x: x.t().reshape(-1), lambda x: x.t().contiguous(), lambda x: x.t().flatten()]
)
def test_a_reshape_that_copies_is_a_piece(copies: Callable[[torch.Tensor], torch.Tensor]) -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return torch.ops.test_split.cut(copies(torch.ops.test_split.cut(x)))

    _, items = split_graph(symbolic_graph_of(function), ["test_split::cut"])
    assert pieces(items) == ["cut", "piece", "cut"]


def test_a_view_that_is_written_through_stays_a_view() -> None:
    """Of a piece's result: the piece could give a copy."""

    def model(x: torch.Tensor) -> object:
        base, other = torch.neg(x), CUT(x)
        rows = base[1:3]
        FILL(other, base)
        again = CUT(rows)
        FILL(other[0:2], rows)
        return (base, again)

    gm = traced(model)
    split_gm, items = split_graph(gm, ["test_split::cut", "test_split::fill"])
    assert pieces(items).count("piece") == 1
    base, again = run_all_ways(gm, split_gm, torch.randn(4, 6))  # type: ignore[misc]
    assert torch.equal(base[3] * 0, torch.zeros(6)) and again.shape == (2, 6)


class Replayed:
    """A piece under a wrapper that replays memory and checks no addresses: it reads what it was captured with, and gives the same memory again."""

    def __init__(self, piece: torch.fx.GraphModule) -> None:
        self.piece = piece
        self.captured: tuple[object, ...] | None = None
        self.given: tuple[torch.Tensor, ...] = ()

    def __call__(self, *inputs: object) -> tuple[torch.Tensor, ...]:
        if self.captured is None:
            self.captured, self.given = inputs, self.piece(*inputs)
            return self.given
        for kept, now in zip(self.given, self.piece(*self.captured), strict=True):
            if isinstance(kept, torch.Tensor):
                kept.copy_(now)
        return self.given


def _between_two_cuts(x: torch.Tensor) -> torch.Tensor:
    y = torch.ops.test_split.cut(x.sin())
    out = torch.empty_like(y)
    torch.ops.test_split.fill(y, out)
    return out * 2


def _before_everything(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    torch.ops.test_split.fill(x, out)
    return out * 2


def _sizes_of_its_own_buffer(x: torch.Tensor) -> torch.Tensor:
    y = torch.ops.test_split.cut(x.sin())
    out = torch.empty_like(y)
    same = y.view(out.size(0) * 2, 3)
    torch.ops.test_split.fill(same, out.view(-1, 3))
    return out + 1


@pytest.mark.parametrize(
    "function", [_between_two_cuts, _before_everything, _sizes_of_its_own_buffer]
)
def test_what_replays_memory_around_pieces_reads_what_was_written(
    function: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    gm = symbolic_graph_of(function)
    split_gm, items = split_graph(gm, [f"test_split::{op}" for op in ("cut", "fill", "pair")])
    for item in items:
        allocated = [n for n in item.graph.graph.nodes if "empty" in str(n.target)]
        assert not (item.is_splitting_graph and allocated)
    wrapped = {
        item.submod_name: item.graph if item.is_splitting_graph else Replayed(item.graph)
        for item in items
    }
    source = generate_source(split_gm, LowerOptions(submods=list(wrapped)))
    forward = compile_execution_fn(source.code, wrapped, source.submod_names)
    x = torch.zeros(4, 6)
    for seed in range(3):
        x.copy_(torch.randn(4, 6, generator=torch.Generator().manual_seed(seed)))
        torch.testing.assert_close(forward(*inputs_of(gm, x))[0], function(x))


def test_no_call_of_a_splitting_op_is_dropped_merged_or_moved() -> None:
    """Also of one that is registered as pure, and writes all the same: only its order, and a result that nobody reads, tell of it."""

    def model(x: torch.Tensor) -> object:
        y = torch.sin(x)
        first = CUT(y)
        CUT(y)  # the same once more, for what it does
        z = torch.cos(y)
        CUT(y)
        return (z + first,)

    gm = traced(model)
    split_gm, items = split_graph(gm, [CUT])
    assert pieces(items) == ["piece", "cut", "piece", "cut", "piece"]
    for options in (LowerOptions(), LowerOptions(submods=["submod_0", "submod_2", "submod_4"])):
        calls: list[str] = []
        code = generate_source(split_gm, options)
        names = {
            name: partial(_called, calls, name, split_gm.get_submodule(name))
            for name in code.submod_names
        }
        seen = partial(_called, calls, "cut", torch.ops.test_split.cut.default)
        direct = generate_source(split_gm, replace(options, direct={CUT: seen}))
        function = compile_execution_fn(direct.code, names, direct.submod_names, direct.consts)
        function(torch.randn(4, 6))
        cuts = "".join("c" if name == "cut" else "p" for name in calls)
        assert cuts == ("ccc" if options.submods is None else "pccpcp")


def _called(calls: list[str], name: str, function: Callable[..., object], *args: object) -> object:
    calls.append(name)
    return function(*args)


# --- naming the operators ------------------------------------------------------------------------


NAMED = ("test_split::cut", "test_split::cut.default", CUT, torch.ops.test_split.cut)


@pytest.mark.parametrize(
    ("target", "op"),
    [
        *((target, op) for target in (CUT, torch.ops.test_split.cut) for op in NAMED),
        (torch.relu, torch.relu),
    ],
)
def test_an_operator_can_be_named_in_every_way(target: Callable[..., object], op: object) -> None:
    gm = traced(lambda x: (torch.sin(target(x)),))
    assert next(n for n in gm.graph.nodes if n.op == "call_function").target is target
    _, items = split_graph(gm, [op])  # type: ignore[list-item]
    assert pieces(items) == ["cut", "piece"]


# --- fitness (S8) --------------------------------------------------------------------------------


def test_fit_operators_and_what_is_known_of_them() -> None:
    out_buffer = check_op("test_split::fill")
    assert out_buffer.fit and out_buffer.mutates == ("out",) and out_buffer.style == "out-buffer"
    fresh = check_op(torch.ops.test_split.pair)
    assert fresh.fit and fresh.style == "fresh outputs" and fresh.returns == ("Tensor", "Tensor")
    assert fresh.name == "test_split::pair.default" and "Tensor x" in fresh.schema


@pytest.mark.parametrize(
    ("op", "style", "problem"),
    [
        ("test_split::unfaked", "fresh outputs", "no fake implementation"),
        (torch.ops.aten.add_.Tensor, "both", "alias"),
    ],
)
def test_an_operator_that_is_not_fit(op: object, style: str, problem: str) -> None:
    report = check_op(op)  # type: ignore[arg-type]
    assert not report.fit and problem in report.problems[0] and report.style == style


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hides", "Argument x is not defined as mutable but was mutated"),
        ("returns", "must not also be an input"),
        ("shrinks", "Shapes torch.Size([1]) and torch.Size([3]) are not equal"),
    ],
)
def test_a_run_tells_what_a_schema_hides(name: str, text: str) -> None:
    kept = torch.ones(3)
    assert check_op(f"test_split::{name}").fit
    report = check_op(f"test_split::{name}", (kept,))
    assert text in report.problems[0]
    assert torch.equal(kept, torch.ones(3))


@pytest.mark.parametrize(
    ("op", "why"),
    [
        *((op, "there is no operator") for op in ("test_split::nothing", "no::op", "nothing")),
        ("aten::add", r"several overloads.*Tensor"),
    ],
)
def test_a_name_of_none_or_several_operators_is_an_error(op: str, why: str) -> None:
    with pytest.raises(SplitError, match=why):
        check_op(op)


# --- size (S7) -----------------------------------------------------------------------------------


def chain(length: int, g: torch.fx.Graph, x: torch.fx.Node) -> object:
    for number in range(length):
        x = g.call_function(CUT if number % 50 == 25 else torch.sin, (x,))
    return (x,)


def test_work_grows_with_the_number_of_nodes_and_not_faster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Counted, not timed: how often the splitter looks at a node."""
    looked = 0
    original = torch.fx.Graph.node_copy

    def counting(self: torch.fx.Graph, *args: object, **kwargs: object) -> torch.fx.Node:
        nonlocal looked
        looked += 1
        return original(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.fx.Graph, "node_copy", counting)
    counts = []
    for length in (1_000, 4_000):
        gm = graph_of(partial(chain, length))
        looked = 0
        split_graph(gm, [CUT])
        counts.append(looked)
    assert counts[1] < 4.2 * counts[0]


CALLED_ALIKE = [
    *(("X", "x"), ("x", "X"), ("A", "a", "A_1", "a_1"), ("layerNorm", "layer_norm", "LayerNorm")),
    *(("input", "Input"), ("x_1", "X", "x"), ("wQ", "w_q", "WQ", "w_Q"), ("T", "t", "T_1")),
]


@pytest.mark.parametrize("names", CALLED_ALIKE)
def test_a_piece_computes_the_same_by_its_code_as_node_by_node(names: tuple[str, ...]) -> None:
    """fx writes a node of `X` as `x`, and its code for a graph begins with `x = X` then, over a parameter `x`."""

    def build(g: torch.fx.Graph, *inputs: torch.fx.Node) -> object:
        cut = g.call_function(CUT, (inputs[0],))
        return tuple(g.call_function(torch.mul, (each, cut)) for each in inputs)

    gm = graph_of(build, *names)
    values = [torch.full((2, 6), float(number)) for number in range(2, 2 + len(names))]
    FakeTensorProp(gm).propagate(*values)
    split_gm, items = split_graph(gm, [CUT])
    for item in items:
        placeholders = item.graph.graph.find_nodes(op="placeholder")
        assert [node.target for node in placeholders] == [node.name for node in placeholders]
    expected = torch.fx.Interpreter(gm).run(*values)
    torch.testing.assert_close(split_gm(*values), expected)
