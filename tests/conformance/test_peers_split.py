"""Cutting a graph and writing it out as peers have it: in, small graphs; out, submodules and stitching source that compute what the graph does."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.fx
from torch.fx.experimental.proxy_tensor import make_fx

from piecework.codegen import (
    SplitItem,
    compile_execution_fn,
    generate_execution_code,
    split_graph,
)

Function = Callable[..., torch.Tensor]


def chain(*steps: Callable[[torch.Tensor], torch.Tensor]) -> torch.fx.GraphModule:
    """A graph that applies one function after the other."""
    graph = torch.fx.Graph()
    value = graph.placeholder("x")
    for step in steps:
        value = graph.call_function(step, (value,))
    graph.output(value)
    return torch.fx.GraphModule(torch.nn.Module(), graph)


def summary(items: Sequence[SplitItem]) -> list[bool]:
    return [item.is_splitting_graph for item in items]


def calls(item: SplitItem) -> list[object]:
    return [node.target for node in item.graph.graph.nodes if node.op == "call_function"]


def cut(function: Function, *inputs: torch.Tensor, at: Sequence[str] = ()) -> torch.fx.GraphModule:
    return split_graph(make_fx(function)(*inputs), at)[0]


def emitted(split_gm: torch.fx.GraphModule) -> tuple[str, list[object], Function]:
    """The source with every submodule written out, its constants, and the function that it is."""
    code, names, consts = generate_execution_code(split_gm)
    return code, list(consts), compile_execution_fn(code, {}, names, consts)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.arange(6.0).reshape(2, 3) - 2


# --- cutting -------------------------------------------------------------------------------------------


def no_tuple_enters(items: Sequence[SplitItem]) -> bool:
    return not any(
        node.target is operator.getitem and node.args[0].op == "placeholder"
        for item in items
        for node in item.graph.graph.nodes
    )


def test_indexing_stays_with_what_returned_the_sequence() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        left, right = torch.split(x, 2, dim=0)
        return torch.cat([torch.relu(left), torch.relu(right)])

    gm = make_fx(function)(torch.randn(4, 3))
    split_gm, items = split_graph(gm, ["aten::split.Tensor"])
    assert len(items) == 2 and no_tuple_enters(items)
    x = torch.randn(4, 3)
    assert torch.equal(split_gm(x), function(x))


def test_no_sequence_crosses_a_cut_whoever_reads_it() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        left, right = torch.split(x, 2, dim=0)
        one, two = torch.relu(left), torch.relu(right)
        return torch.cat([left, right, torch.sigmoid(one), two])

    gm = make_fx(function)(torch.randn(4, 3))
    split_gm, items = split_graph(gm, ["aten::split.Tensor", "aten::sigmoid"])
    assert len(items) == 4 and no_tuple_enters(items)
    x = torch.randn(4, 3)
    assert torch.equal(split_gm(x), function(x))


def test_two_neighbours_share_a_submodule() -> None:
    _, items = split_graph(chain(torch.neg, torch.relu, torch.sigmoid), [torch.neg, torch.relu])
    assert summary(items) == [True, False]
    assert calls(items[0]) == [torch.neg, torch.relu] and calls(items[1]) == [torch.sigmoid]


def test_any_number_of_neighbours_share_a_submodule() -> None:
    steps = [torch.neg, torch.relu, torch.sigmoid, torch.abs]
    _, items = split_graph(chain(*steps), steps)
    assert summary(items) == [True] and calls(items[0]) == steps


def test_what_stands_between_two_keeps_them_apart() -> None:
    _, items = split_graph(chain(torch.neg, torch.sigmoid, torch.relu), [torch.neg, torch.relu])
    assert summary(items) == [True, False, True]


def test_a_leading_operator_leaves_what_follows_apart() -> None:
    _, items = split_graph(chain(torch.neg, torch.sigmoid), [torch.neg])
    assert summary(items) == [True, False] and calls(items[1]) == [torch.sigmoid]


def test_a_trailing_operator_leaves_what_precedes_apart() -> None:
    _, items = split_graph(chain(torch.sigmoid, torch.relu), [torch.relu])
    assert summary(items) == [False, True] and calls(items[0]) == [torch.sigmoid]


@pytest.mark.parametrize("cuts", [0, 1, 2])
def test_operators_and_pieces_alternate(cuts: int) -> None:
    steps = [torch.sin, *([torch.neg, torch.cos] * cuts)]
    split_gm, items = split_graph(chain(*steps), [torch.neg])
    assert summary(items) == [False, *([True, False] * cuts)]
    assert [item.submod_name for item in items] == [f"submod_{i}" for i in range(1 + 2 * cuts)]
    assert all(hasattr(split_gm, item.submod_name) for item in items)
    assert [item.graph_id for item in items] == list(range(1 + 2 * cuts))
    value = torch.randn(4)
    assert torch.equal(split_gm(value), chain(*steps)(value))


def test_sizes_cross_a_cut_and_never_a_whole_shape() -> None:
    captured: list[torch.fx.GraphModule] = []

    def backend(gm: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        captured.append(gm)
        return gm

    def function(x: torch.Tensor) -> torch.Tensor:
        rows, columns = x.shape
        for _ in range(3):
            x = torch.ops.aten.sigmoid.default(x).clone().view(rows, columns)
        return x

    x = torch.randn(4, 8)
    torch._dynamo.mark_dynamic(x, 0)
    torch.compile(function, backend=backend, fullgraph=True)(x)
    split_gm, items = split_graph(captured[0], ["aten::sigmoid"])
    assert sum(summary(items)) == 3
    for node in split_gm.graph.nodes:
        assert not isinstance(node.meta.get("example_value"), torch.Size)
    for rows in (4, 7):
        given = torch.randn(rows, 8)
        inputs = [
            rows if isinstance(node.meta["example_value"], torch.SymInt) else given
            for node in split_gm.graph.find_nodes(op="placeholder")
        ]
        assert torch.equal(split_gm(*inputs)[0], function(given))


# --- writing out ---------------------------------------------------------------------------------------


def to_half(x: torch.Tensor) -> torch.Tensor:
    return x.to(device=torch.device("cpu"), dtype=torch.float16)


def empty_half(x: torch.Tensor) -> torch.Tensor:
    made = torch.empty(x.shape, device=torch.device("cpu"), dtype=torch.float16)
    return made.fill_(0).add(x.to(dtype=torch.float16))


@pytest.mark.parametrize("function", [to_half, empty_half])
def test_a_device_is_never_written_as_its_repr(function: Function, x: torch.Tensor) -> None:
    code, _, run = emitted(cut(function, x))
    statements = [line for line in code.splitlines() if not line.startswith("#")]
    assert "device(type=" not in "".join(statements)
    assert torch.equal(run(x), function(x))


def test_the_same_dtype_is_one_value_and_others_are_others(x: torch.Tensor) -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return x.to(dtype=torch.float16) + (x * 2).to(dtype=torch.float16) + x.to(torch.bfloat16)

    _, consts, run = emitted(cut(function, x))
    assert [consts.count(each) for each in (torch.float16, torch.bfloat16)] == [1, 1]
    assert torch.equal(run(x), function(x))


def test_constants_keep_their_order_over_traces(x: torch.Tensor) -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        half = x.to(device=torch.device("cpu"), dtype=torch.float16)
        return half.to(dtype=torch.bfloat16)

    first, second = (emitted(cut(function, x)) for _ in range(2))
    assert first[:2] == second[:2]


def test_plain_arguments_are_written_in_place(x: torch.Tensor) -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return torch.transpose(x, 0, 1).relu()

    code, consts, run = emitted(cut(function, x))
    assert consts == [] and "0, 1" in code
    assert torch.equal(run(x), function(x))


def test_constants_are_shared_by_the_submodules(x: torch.Tensor) -> None:
    marker = torch.device("cpu")

    def uses(x: torch.Tensor, what: object) -> torch.Tensor:
        assert what is marker
        return x + 1

    graph = torch.fx.Graph()
    value = graph.placeholder("x")
    for step in (uses, torch.relu, torch.neg, uses):
        value = graph.call_function(step, (value, marker) if step is uses else (value,))
    graph.output(value)
    split_gm, items = split_graph(torch.fx.GraphModule(torch.nn.Module(), graph), [torch.relu])
    assert summary(items) == [False, True, False]
    code, consts, run = emitted(split_gm)
    assert sum(each is marker for each in consts) == 1
    assert code.count(f"__vllm_consts__[{[id(c) for c in consts].index(id(marker))}]") == 2
    assert torch.equal(run(x), 1 - (x + 1).relu())


def test_a_compiled_submodule_is_called_by_its_index(x: torch.Tensor) -> None:
    class Compiled(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *args: object) -> object:
            return self.inner(*args)

    def function(x: torch.Tensor) -> torch.Tensor:
        return x.relu().sigmoid()

    split_gm = cut(function, x, at=["aten::relu.default"])
    name = next(name for name, _ in split_gm.named_children())
    inner = split_gm.get_submodule(name)
    del split_gm._modules[name]
    split_gm.add_module(name, Compiled(inner))
    code, names, consts = generate_execution_code(split_gm)
    assert "__vllm_submods__[" in code and name in names
    run = compile_execution_fn(code, {name: split_gm.get_submodule(name)}, names, consts)
    assert torch.equal(run(x), function(x))


def test_values_are_deleted_after_their_last_use(x: torch.Tensor) -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return x.relu().sigmoid().tanh()

    split_gm = cut(function, x, at=["aten::relu.default", "aten::sigmoid.default"])
    assert re.search(r"^    del \w+", emitted(split_gm)[0], re.MULTILINE)


def test_a_module_inside_a_submodule_that_is_written_out_is_called_by_its_index() -> None:
    graph = torch.fx.Graph()
    graph.output(graph.call_module("inner", (graph.placeholder("x"),)))
    root = torch.nn.Module()
    root.add_module("inner", torch.nn.ReLU())
    outer = torch.fx.Graph()
    outer.output(outer.call_module("submod_0", (outer.placeholder("x"),)))
    top = torch.nn.Module()
    top.add_module("submod_0", torch.fx.GraphModule(root, graph))
    code, names, consts = generate_execution_code(torch.fx.GraphModule(top, outer))
    assert names == ["submod_0.inner"]
    run = compile_execution_fn(code, {"submod_0.inner": root.inner}, names, consts)
    assert run(torch.tensor([-1.0, 2.0])).tolist() == [0.0, 2.0]


@pytest.mark.parametrize(
    "argument", [["device", 1], ("device", 2), ("device",), {"k": "device"}], ids=str
)
def test_constants_inside_containers(argument: object) -> None:
    marker = torch.device("cpu")

    def filled(value: object) -> object:
        if isinstance(value, dict):
            return {key: filled(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(filled(each) for each in value)
        return marker if value == "device" else value

    seen: list[object] = []

    def look(x: torch.Tensor, given: object) -> torch.Tensor:
        seen.append(given)
        return x

    graph = torch.fx.Graph()
    value = graph.placeholder("x")
    graph.output(graph.call_function(look, (value, filled(argument))))
    split_gm, _ = split_graph(torch.fx.GraphModule(torch.nn.Module(), graph), [])
    emitted(split_gm)[2](torch.zeros(1))
    assert seen == [filled(argument)] and type(seen[0]) is type(argument)


def test_code_without_constants_still_runs() -> None:
    code = (
        "import torch\n"
        "def execution_fn(x, *, __vllm_submods__):\n"
        "    return __vllm_submods__[0](x) + 1\n"
    )
    run = compile_execution_fn(code, {"sub": lambda x: x + 1}, ["sub"], consts=None)
    assert torch.equal(run(torch.zeros(3)), torch.full((3,), 2.0))
