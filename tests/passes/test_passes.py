"""Graph passes on hand-written aten graphs: what each removes, what it must leave, and what identifies a pass."""

from __future__ import annotations

import operator
import sys
import textwrap
from collections.abc import Callable, Iterator

import pytest
import torch
from torch._functorch.aot_autograd import aot_function, make_boxed_func
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from piecework.errors import ConfigError, PieceCompileError
from piecework.runtime.batch.ranges import Range
from piecework.runtime.config.compilation import CompilationConfig
from piecework.runtime.config.qualified_name import import_qualified
from piecework.runtime.passes import (
    CallableInductorPass,
    CleanUpPass,
    DefunctionalizationPass,
    InductorPass,
    NoOpEliminationPass,
    PostGradPassManager,
    as_inductor_pass,
    get_pass_context,
    pass_context,
)

aten = torch.ops.aten


@pytest.fixture(scope="module", autouse=True)
def operators() -> Iterator[None]:
    """``fill``: writes ``out`` and returns nothing. ``pair``: writes two, returns one."""
    library = torch.library.Library("passes_test", "FRAGMENT")
    library.define("fill(Tensor x, Tensor(a!) out, float scale=2.0) -> ()")
    library.define("pair(Tensor x, Tensor(a!) left, Tensor(b!)? right=None) -> Tensor")

    def fill(x: torch.Tensor, out: torch.Tensor, scale: float = 2.0) -> None:
        out.copy_(x * scale)

    def pair(
        x: torch.Tensor, left: torch.Tensor, right: torch.Tensor | None = None
    ) -> torch.Tensor:
        left.add_(x)
        if right is not None:
            right.mul_(x)
        return x + 1

    for name, function in (("fill", fill), ("pair", pair)):
        library.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake("passes_test::fill", lambda x, out, scale=2.0: None, lib=library)
    torch.library.register_fake(
        "passes_test::pair", lambda x, left, right=None: torch.empty_like(x), lib=library
    )
    yield
    library._destroy()


class Builder:
    """Writes an aten graph by hand; each call records its fake value, as Inductor's graphs have it."""

    def __init__(self) -> None:
        self.graph = torch.fx.Graph()
        self.mode = FakeTensorMode(shape_env=ShapeEnv())

    def input(self, name: str, *shape: int) -> torch.fx.Node:
        node = self.graph.placeholder(name)
        with self.mode:
            node.meta["val"] = torch.empty(shape)
        return node

    def call(build, target, /, *args, **kwargs):  # type: ignore[no-untyped-def]
        node = build.graph.call_function(target, args, kwargs)
        values, named = torch.fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        with build.mode:
            node.meta["val"] = target(*values, **named)
        return node

    def done(self, *outputs: torch.fx.Node) -> torch.fx.Graph:
        self.graph.output(tuple(outputs))
        self.graph.lint()
        return self.graph


def run(graph: torch.fx.Graph, *inputs: torch.Tensor) -> object:
    module = torch.fx.GraphModule(torch.nn.Module(), graph)
    return torch.fx.Interpreter(module).run(*(each.clone() for each in inputs))


def targets(graph: torch.fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


# --- no-ops ------------------------------------------------------------------------------------------

WHOLE = 2**63 - 1
SLICES = {
    "nothing given": ((), {}),
    "dim": ((0,), {}),
    "dim and none": ((1, None, None), {}),
    "positional": ((1, 0, 6, 1), {}),
    "to the end": ((0, 0, WHOLE), {}),
    "named": ((), {"dim": 1, "start": 0, "end": WHOLE, "step": 1}),
    "mixed": ((1,), {"end": 100}),
    "negative start": ((1, -6), {}),
    "negative dim": ((-1, 0, 6), {}),
}


@pytest.mark.parametrize("form", SLICES)
@pytest.mark.parametrize("recorded", [True, False])
def test_a_slice_of_everything_goes_whatever_its_form(form: str, recorded: bool) -> None:
    args, kwargs = SLICES[form]
    build = Builder()
    x = build.input("x", 4, 6)
    part = build.call(aten.slice.Tensor, x, *args, **kwargs)
    graph = build.done(build.call(aten.add.Tensor, part, 1))
    if not recorded:
        part.meta.clear()
    data = torch.randn(4, 6)
    before = run(graph, data)
    # Without the sizes only "from 0 to the end" can be known to be everything.
    sure = recorded or (
        kwargs.get("start", args[1] if len(args) > 1 else None) in (None, 0)
        and kwargs.get("end", args[2] if len(args) > 2 else None) in (None, WHOLE)
    )
    assert NoOpEliminationPass()(graph) == int(sure)
    assert ("aten.slice.Tensor" in targets(graph)) == (not sure)
    torch.testing.assert_close(run(graph, data), before)


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [((0, 1), {}), ((1, 0, 5), {}), ((), {"step": 2}), ((1,), {"start": -5}), ((0, 0, -1), {})],
)
def test_a_slice_of_a_part_stays(args: tuple[int, ...], kwargs: dict[str, int]) -> None:
    build = Builder()
    part = build.call(aten.slice.Tensor, build.input("x", 4, 6), *args, **kwargs)
    graph = build.done(build.call(aten.add.Tensor, part, 1))
    assert NoOpEliminationPass()(graph) == 0


@pytest.mark.parametrize("form", SLICES)
def test_a_slice_scatter_over_everything_goes_whatever_its_form(form: str) -> None:
    args, kwargs = SLICES[form]
    build = Builder()
    x, y = build.input("x", 4, 6), build.input("y", 4, 6)
    source = build.call(aten.mul.Tensor, y, 2)
    if form == "named":
        into = build.call(aten.slice_scatter.default, self=x, src=source, **kwargs)
    else:
        into = build.call(aten.slice_scatter.default, x, source, *args, **kwargs)
    graph = build.done(build.call(aten.add.Tensor, into, 1))
    data = torch.randn(4, 6), torch.randn(4, 6)
    before = run(graph, *data)
    assert NoOpEliminationPass()(graph) == 1
    assert targets(graph) == ["aten.mul.Tensor", "aten.add.Tensor"]
    torch.testing.assert_close(run(graph, *data), before)


def test_a_slice_scatter_over_a_part_stays() -> None:
    build = Builder()
    x, y = build.input("x", 4, 6), build.input("y", 4, 3)
    into = build.call(aten.slice_scatter.default, x, y, 1, 3)
    assert NoOpEliminationPass()(build.done(build.call(aten.add.Tensor, into, 1))) == 0


@pytest.mark.parametrize("target", [aten.view.default, aten.reshape.default])
@pytest.mark.parametrize(("shape", "goes"), [([4, 6], 1), ([-1, 6], 1), ([4, -1], 1), ([24], 0)])
def test_a_reshape_to_the_same_shape_goes(
    target: Callable[..., object], shape: list[int], goes: int
) -> None:
    build = Builder()
    shaped = build.call(target, build.input("x", 4, 6), shape)
    graph = build.done(build.call(aten.add.Tensor, shaped, 1))
    assert NoOpEliminationPass()(graph) == goes


def test_symbolic_sizes_are_compared_as_expressions() -> None:
    def program(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        half = x[: y.shape[0]]  # not everything: the two sizes are different symbols
        whole = x[: x.shape[0]].reshape(x.shape[0], 6)
        return half.sum() + whole.sum()

    traced = make_fx(program, tracing_mode="symbolic")(torch.randn(7, 6), torch.randn(3, 2))
    kept = len(traced.graph.find_nodes(op="call_function", target=aten.slice.Tensor))
    matches = NoOpEliminationPass()(traced.graph)
    left = len(traced.graph.find_nodes(op="call_function", target=aten.slice.Tensor))
    assert matches >= 1 and left == kept - 1 == 1


def shortened(graph: torch.fx.Graph, *inputs: torch.Tensor) -> list[str]:
    """What is left of ``graph`` after the pass; its results are the same."""
    before = run(graph, *inputs)
    matches = NoOpEliminationPass()(graph)
    graph.lint()
    torch.testing.assert_close(run(graph, *inputs), before, rtol=0, atol=0)
    assert NoOpEliminationPass()(graph) == 0 and matches >= 0
    return targets(graph)


@pytest.mark.parametrize(
    "target", [aten.view.default, aten.reshape.default, aten._unsafe_view.default]
)
def test_a_chain_of_reshapes_is_one(target: Callable[..., object]) -> None:
    build = Builder()
    value = build.call(aten.mul.Tensor, build.input("x", 4, 6), 2)
    for shape in ([24], [2, 12], [24], [3, 8]):
        value = build.call(target, value, shape)
    graph = build.done(build.call(aten.add.Tensor, value, 1))
    assert shortened(graph, torch.randn(4, 6)) == [
        "aten.mul.Tensor",
        str(target),
        "aten.add.Tensor",
    ]


def test_a_chain_that_leads_back_goes_and_one_that_is_read_on_the_way_stays() -> None:
    build = Builder()
    x = build.call(aten.mul.Tensor, build.input("x", 4, 6), 2)
    flat = build.call(aten.view.default, x, [24])
    back = build.call(aten.view.default, flat, [4, 6])
    graph = build.done(build.call(aten.add.Tensor, back, 1), build.call(aten.add.Tensor, flat, 1))
    left = ["aten.mul.Tensor", "aten.view.default", "aten.add.Tensor", "aten.add.Tensor"]
    assert shortened(graph, torch.randn(4, 6)) == left


def test_a_reshape_that_copies_stays_in_its_chain() -> None:
    build = Builder()
    across = build.call(aten.permute.default, build.input("x", 4, 6), [1, 0])
    copied = build.call(aten.reshape.default, across, [24])
    graph = build.done(
        build.call(aten.add.Tensor, build.call(aten.view.default, copied, [6, 4]), 1)
    )
    assert shortened(graph, torch.randn(4, 6)).count("aten.reshape.default") == 1


@pytest.mark.parametrize(
    ("first", "second", "one"),
    [
        ((0, 2, 9), (0, 1, 4), (0, 3, 6, 1)),
        ((0, 2), (0, 1), (0, 3, WHOLE, 1)),
        ((0, 0, -1), (0, 1), (0, 1, 9, 1)),
        ((0, 1), (0, 0, -2), (0, 1, 8, 1)),
        ((0, 1, 9, 2), (0, 1, 3, 2), (0, 3, 7, 4)),
        ((-2, 3, 5), (0, 1, 7), (0, 4, 5, 1)),
        ((0, 5, 3), (0, 1, 2), (0, 6, 3, 1)),  # of nothing
    ],
)
def test_a_slice_of_a_slice_is_one(
    first: tuple[int, ...], second: tuple[int, ...], one: tuple[int, ...]
) -> None:
    build = Builder()
    inner = build.call(aten.slice.Tensor, build.input("x", 10, 3), *first)
    graph = build.done(build.call(aten.slice.Tensor, inner, *second))
    data = torch.randn(10, 3)
    before = run(graph, data)
    assert NoOpEliminationPass()(graph) == 1
    (left,) = graph.find_nodes(op="call_function", target=aten.slice.Tensor)
    assert left.args[1:] == one
    torch.testing.assert_close(run(graph, data), before)


def test_a_slice_of_a_part_of_a_split_is_a_slice() -> None:
    build = Builder()
    parts = build.call(aten.split_with_sizes.default, build.input("x", 4, 10), [3, 7], 1)
    part = build.call(operator.getitem, parts, 1)
    graph = build.done(build.call(aten.slice.Tensor, part, 1, 2, 5))
    assert shortened(graph, torch.randn(4, 10)) == ["aten.slice.Tensor"]


def test_equal_splits_and_equal_slices_are_taken_once() -> None:
    build = Builder()
    x = build.input("x", 4, 10)
    parts = [build.call(aten.split_with_sizes.default, x, [3, 7], dim) for dim in (1, -1, 1)]
    used = [build.call(operator.getitem, each, n) for n in (0, 1) for each in parts]
    used += [build.call(aten.slice.Tensor, x, 0, 1) for _ in range(2)]
    graph = build.done(*(build.call(aten.add.Tensor, each, 1) for each in used))
    left = shortened(graph, torch.randn(4, 10))
    assert left.count("aten.slice.Tensor") == 1
    assert left.count("aten.split_with_sizes.default") <= 2  # -1 and 1 are written differently


def test_slices_of_a_whole_dimension_are_a_split() -> None:
    build = Builder()
    x = build.input("x", 4, 10)
    bounds = [(5, WHOLE), (0, 2), (2, 5)]
    cut = [build.call(aten.slice.Tensor, x, 1, *each) for each in bounds]
    graph = build.done(*(build.call(aten.add.Tensor, each, 1) for each in cut))
    left = shortened(graph, torch.randn(4, 10))
    assert left[:4] == ["aten.split_with_sizes.default", *["<built-in function getitem>"] * 3]
    (split,) = graph.find_nodes(op="call_function", target=aten.split_with_sizes.default)
    assert split.args[1:] == ([2, 3, 5], 1)
    assert [tuple(each.shape) for each in split.meta["val"]] == [(4, 2), (4, 3), (4, 5)]


@pytest.mark.parametrize(
    "bounds", [[(0, 4), (5, 10)], [(0, 5), (4, 10)], [(0, 5)], [(0, 5), (5, 9)]]
)
def test_other_slices_stay(bounds: list[tuple[int, int]]) -> None:
    build = Builder()
    x = build.input("x", 4, 10)
    cut = [build.call(aten.slice.Tensor, x, 1, *each) for each in bounds]
    graph = build.done(*(build.call(aten.add.Tensor, each, 1) for each in cut))
    assert NoOpEliminationPass()(graph) == 0


def test_symbolic_chains_are_shortened() -> None:
    def program(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = x * 2
        flat = x.reshape(-1, 4, 2).reshape(x.shape[0], 8).reshape(-1)
        return flat + 1, x[1:][: y.shape[0]] + 1, x[: y.shape[0]][:2] + 1, x[:, :3], x[:, 3:]

    traced = make_fx(program, tracing_mode="symbolic")(torch.randn(7, 8), torch.randn(3, 2))
    data = [torch.randn(9, 8), torch.randn(5, 2)]
    before = traced(*data)
    NoOpEliminationPass()(traced.graph)
    traced.graph.lint()
    traced.recompile()
    torch.testing.assert_close(traced(*data), before)
    assert targets(traced.graph).count("aten.view.default") == 1


def test_a_write_through_a_shortened_view_is_still_seen() -> None:
    build = Builder()
    x = build.call(aten.mul.Tensor, build.input("x", 4, 6), 2)
    flat = build.call(aten.view.default, x, [24])
    part = build.call(aten.slice.Tensor, build.call(aten.slice.Tensor, flat, 0, 2), 0, 0, 5)
    again = build.call(aten.view.default, flat, [2, 12])
    build.call(aten.mul_.Tensor, part, 10)
    build.call(aten.add_.Tensor, again, 3)
    graph = build.done(build.call(aten.add.Tensor, x, 1), build.call(aten.add.Tensor, part, 1))
    left = shortened(graph, torch.randn(4, 6))
    assert left.count("aten.mul_.Tensor") == left.count("aten.add_.Tensor") == 1


def test_an_output_does_not_become_an_input_or_another_output() -> None:
    build = Builder()
    x = build.input("x", 4, 6)
    y = build.call(aten.mul.Tensor, x, 2)
    same_x = build.call(aten.view.default, x, [4, 6])
    same_y = build.call(aten.view.default, y, [4, 6])
    copy_of_x = build.call(aten.slice_scatter.default, y, x)
    graph = build.done(same_x, y, same_y, copy_of_x)
    assert NoOpEliminationPass()(graph) == 0


def test_a_copy_stays_when_what_it_copied_is_written_later() -> None:
    build = Builder()
    x = build.input("x", 4, 6)
    y = build.call(aten.mul.Tensor, x, 2)
    z = build.call(aten.mul.Tensor, x, 3)
    copied = build.call(aten.slice_scatter.default, z, y)
    build.call(aten.add_.Tensor, y, 1)
    graph = build.done(build.call(aten.add.Tensor, copied, 1))
    data = torch.randn(4, 6)
    before = run(graph, data)
    assert NoOpEliminationPass()(graph) == 0
    torch.testing.assert_close(run(graph, data), before)


# --- de-functionalisation ----------------------------------------------------------------------------


def functional(program: Callable[..., object], *inputs: torch.Tensor) -> torch.fx.GraphModule:
    """``program`` with its writes made functional, as AOTAutograd hands it to Inductor."""
    found: list[torch.fx.GraphModule] = []

    def keep(module: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        found.append(module)
        return make_boxed_func(module.forward)

    with torch.no_grad():
        aot_function(program, fw_compiler=keep, keep_inference_input_mutations=True)(
            *(each.clone() for each in inputs)
        )
    return found[0]


def hop_count(graph: torch.fx.Graph) -> int:
    return sum("auto_functionalized" in each for each in targets(graph))


def check_in_place(
    program: Callable[..., object], matches: int, *inputs: torch.Tensor
) -> list[str]:
    module = functional(program, *inputs)
    before = hop_count(module.graph)
    assert before, "the program must have a functionalised call"
    expected = [each.clone() for each in inputs]
    result = program(*expected)
    assert DefunctionalizationPass()(module.graph) == matches
    CleanUpPass()(module.graph)
    assert hop_count(module.graph) == before - matches
    module.recompile()
    given = [each.clone() for each in inputs]
    found = module(*given)
    torch.testing.assert_close(found, result if isinstance(result, tuple) else (result,))
    torch.testing.assert_close(given, expected)
    return targets(module.graph)


def test_a_fresh_buffer_is_written_in_place() -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        torch.ops.passes_test.fill(x, out)
        return out + 1

    found = check_in_place(program, 1, torch.randn(3, 4))
    assert found[1:] == ["passes_test.fill.default", "aten.add.Tensor"]


def test_each_buffer_of_a_row_of_calls_is_written_in_place() -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        for _ in range(3):
            torch.ops.passes_test.pair(x, out)
        return out * 2

    check_in_place(program, 3, torch.randn(3, 4))


def test_two_written_arguments_and_a_result() -> None:
    def program(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        left, right = torch.ones_like(x), torch.ones_like(x) * 2
        result = torch.ops.passes_test.pair(x, left, right)
        return left + 1, right + 1, result + 1

    check_in_place(program, 1, torch.randn(3, 4))


def test_parts_of_one_buffer_are_written_in_place() -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty(2, 3, 4)
        torch.ops.passes_test.fill(x, out[0], 3.0)
        torch.ops.passes_test.fill(x, out[1], 4.0)
        return out.sum(0)

    check_in_place(program, 2, torch.randn(3, 4))


def test_an_input_is_written_in_place_where_it_is_written_back_anyway() -> None:
    def program(x: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
        torch.ops.passes_test.fill(x, cache)
        return cache * 2

    found = check_in_place(program, 1, torch.randn(3, 4), torch.randn(3, 4))
    assert "aten.copy_.default" not in found


def test_an_old_value_that_is_read_later_is_kept() -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        out = torch.ones_like(x)
        old = out.clone()
        torch.ops.passes_test.pair(x, out)
        return out * old

    module = functional(program, torch.randn(3, 4))
    # What a clone elimination may leave behind: the old value itself is read after the write.
    (clone,) = module.graph.find_nodes(op="call_function", target=aten.clone.default)
    clone.replace_all_uses_with(clone.args[0])
    module.graph.erase_node(clone)
    module.recompile()
    x = torch.randn(3, 4)
    expected = module(x)
    assert DefunctionalizationPass()(module.graph) == 0
    module.recompile()
    torch.testing.assert_close(module(x), expected)


def test_an_old_value_that_is_read_later_through_a_view_is_kept() -> None:
    build = Builder()
    x = build.input("x", 3, 4)
    out = build.call(aten.mul.Tensor, x, 1)
    flat = build.call(aten.view.default, out, [12])
    written = build.call(
        torch.ops.higher_order.auto_functionalized,
        torch.ops.passes_test.fill.default,
        x=x,
        out=out,
        scale=2.0,
    )
    new = build.call(operator.getitem, written, 1)
    later = build.call(aten.sum.default, flat)
    graph = build.done(build.call(aten.add.Tensor, new, later))
    assert DefunctionalizationPass()(graph) == 0
    # The same without the late reader is put in place.
    graph.output_node().args = ((new,),)
    graph.eliminate_dead_code()
    assert DefunctionalizationPass()(graph) == 1
    torch.testing.assert_close(run(graph, torch.ones(3, 4))[0], torch.full((3, 4), 2.0))


def test_an_input_that_is_not_written_back_is_kept() -> None:
    build = Builder()
    x, y = build.input("x", 3, 4), build.input("y", 3, 4)
    written = build.call(
        torch.ops.higher_order.auto_functionalized,
        torch.ops.passes_test.fill.default,
        x=x,
        out=y,
        scale=2.0,
    )
    graph = build.done(build.call(operator.getitem, written, 1))
    assert DefunctionalizationPass()(graph) == 0


def test_a_call_that_reads_what_it_writes_is_kept() -> None:
    build = Builder()
    buffer = build.call(aten.mul.Tensor, build.input("x", 3, 4), 1)
    written = build.call(
        torch.ops.higher_order.auto_functionalized,
        torch.ops.passes_test.fill.default,
        x=buffer,
        out=buffer,
        scale=2.0,
    )
    graph = build.done(build.call(operator.getitem, written, 1))
    assert DefunctionalizationPass()(graph) == 0


# --- clean-up ----------------------------------------------------------------------------------------


def test_nodes_move_after_what_they_read_and_dead_ones_go() -> None:
    build = Builder()
    x = build.input("x", 3)
    first = build.call(aten.mul.Tensor, x, 2)
    second = build.call(aten.add.Tensor, first, 1)
    build.call(aten.neg.default, x)  # dead
    written = build.call(aten.add_.Tensor, first, 1)  # no user, but it writes
    graph = build.done(second)
    second.append(first)  # now second stands before first
    assert CleanUpPass()(graph) >= 2
    order = [node.name for node in graph.nodes]
    assert order.index(first.name) < order.index(second.name)
    assert written.name in order and "neg" not in order
    assert CleanUpPass()(graph) == 0


def test_a_circle_is_an_error_that_names_it() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    a = graph.call_function(aten.neg.default, (x,))
    b = graph.call_function(aten.neg.default, (a,))
    graph.output((b,))
    a.args = (b,)
    with pytest.raises(PieceCompileError, match="%neg"):
        CleanUpPass()(graph)


# --- identity ----------------------------------------------------------------------------------------


class Scaled(InductorPass):
    def __init__(self, factor: float, op: object = aten.mul.Tensor) -> None:
        self.factor = factor
        self.op = op

    def __call__(self, graph: torch.fx.Graph) -> int:
        return len(graph.find_nodes(op="call_function", target=self.op))


class OnlySmall(Scaled):
    def is_applicable_for_range(self, compile_range: Range | None) -> bool:
        return compile_range is not None and compile_range.end <= 16


def test_the_uuid_follows_state() -> None:
    assert Scaled(2.0).uuid() == Scaled(2.0).uuid()
    different = [Scaled(2.0), Scaled(3.0), Scaled(2.0, aten.add.Tensor), OnlySmall(2.0)]
    assert len({each.uuid() for each in different}) == len(different)
    changed = Scaled(2.0)
    before = changed.uuid()
    changed.extra = {"threshold": [1, 2]}  # type: ignore[attr-defined]
    assert changed.uuid() != before


def write_module(folder, name: str, text: str) -> None:  # type: ignore[no-untyped-def]
    (folder / f"{name}.py").write_text(textwrap.dedent(text))


@pytest.mark.parametrize("kind", ["class", "function", "what it calls", "constant"])
def test_the_uuid_follows_source(tmp_path, monkeypatch, kind: str) -> None:  # type: ignore[no-untyped-def]
    text = """
        from piecework.runtime.passes import InductorPass
        LIMIT = 3
        def count(graph):
            return len(graph.nodes) + LIMIT
        def as_function(graph):
            return count(graph)
        class AsClass(InductorPass):
            def __call__(self, graph):
                value = count(graph)
                return value
    """
    edits = {
        "class": ("return value", "return value + 1"),
        "function": ("return count(graph)", "return count(graph) * 2"),
        "what it calls": ("len(graph.nodes) + LIMIT", "len(graph.nodes) - LIMIT"),
        "constant": ("LIMIT = 3", "LIMIT = 4"),
    }
    name = "as_function" if kind == "function" else "AsClass"
    ids = []
    for version in ("one", "same", "other"):  # a module counts with its name
        folder = tmp_path / version
        folder.mkdir()
        write_module(folder, "a_module", text.replace(*edits[kind]) if version == "other" else text)
        with monkeypatch.context() as patch:
            patch.syspath_prepend(str(folder))
            patch.delitem(sys.modules, "a_module", raising=False)
            found = import_qualified(f"a_module:{name}", where="")
            ids.append(as_inductor_pass(found, where="").uuid())
    assert ids[0] == ids[1] != ids[2]


def test_a_pass_without_a_stable_form_is_an_error() -> None:
    with pytest.raises(ConfigError, match="stable form"):
        Scaled(2.0, torch.randn(2)).uuid()


def test_a_function_with_its_identity_in_the_order_of_the_field() -> None:
    def look(graph: torch.fx.Graph) -> None:
        pass

    given = CallableInductorPass(look, "look, version 3")
    assert given.uuid() == "look, version 3" and given.name == "look"
    assert CallableInductorPass(look, name="other").name == "other"
    assert CallableInductorPass(look, uuid=("look", 3)).uuid() not in (look, "look")
    assert (
        CallableInductorPass(look, ("look", 3)).uuid()
        == CallableInductorPass(look, ("look", 3)).uuid()
    )
    assert CallableInductorPass(look).uuid() != CallableInductorPass(look, "").uuid()
    source = InductorPass.hash_source(look, "text", given)
    assert CallableInductorPass(look, source).uuid() == source
    assert source != InductorPass.hash_source(look, "another", given)
    assert InductorPass.hash_dict({"a": 1, "b": [2]}) == InductorPass.hash_dict({"b": [2], "a": 1})
    with pytest.raises(ConfigError, match="stable form"):
        _ = CallableInductorPass(look, object()).uuid()


def test_qualified_names_classes_and_functions_are_passes() -> None:
    assert isinstance(as_inductor_pass(len, where="x"), CallableInductorPass)
    made = as_inductor_pass("piecework.runtime.passes:CleanUpPass", where="x")
    assert isinstance(made, CleanUpPass)
    for wrong in ("piecework.runtime.passes:Nothing", "piecework.runtime.passes:__all__", Scaled):
        with pytest.raises(ConfigError) as caught:
            as_inductor_pass(wrong, where="inductor_passes.slot")
        assert "inductor_passes.slot" in str(caught.value)


# --- the manager -------------------------------------------------------------------------------------


def small_graph() -> torch.fx.Graph:
    build = Builder()
    x = build.input("x", 4)
    same = build.call(aten.view.default, x, [4])
    return build.done(build.call(aten.mul.Tensor, same, 2))


def test_the_manager_runs_what_applies_and_counts() -> None:
    seen: list[Range | None] = []

    def look(graph: torch.fx.Graph) -> None:
        seen.append(get_pass_context().compile_range)

    manager = PostGradPassManager(
        [NoOpEliminationPass(), OnlySmall(1.0), CallableInductorPass(look)]
    )
    with pass_context(Range(1, 16)):
        manager(small_graph())
    with pass_context(Range(17, 64)):
        manager(small_graph())
    manager(small_graph())
    assert seen == [Range(1, 16), Range(17, 64), None]
    rows = {row.name: (row.graphs, row.matches) for row in manager.report().rows()}
    assert rows == {"NoOpEliminationPass": (3, 3), "OnlySmall": (1, 1), "look": (3, None)}
    assert manager.report().matches("OnlySmall") == 1
    assert "pass OnlySmall: 1 matches in 1 graphs" in str(manager.report())


def test_the_managers_uuid_follows_the_range_and_the_order() -> None:
    manager = PostGradPassManager([NoOpEliminationPass(), CleanUpPass()])
    turned = PostGradPassManager([CleanUpPass(), NoOpEliminationPass()])
    with pass_context(Range(1, 16)):
        small = manager.uuid()
        assert small == PostGradPassManager([NoOpEliminationPass(), CleanUpPass()]).uuid()
        assert small != turned.uuid()
    assert small != manager.uuid()


def test_a_pass_that_fails_is_named() -> None:
    def broken(graph: torch.fx.Graph) -> None:
        raise ValueError("no such pattern")

    with pytest.raises(PieceCompileError, match="pass broken failed: ValueError: no such pattern"):
        PostGradPassManager([CallableInductorPass(broken)])(small_graph())


def test_the_configuration_chooses_and_orders_the_passes() -> None:
    def names(**fields: object) -> list[str]:
        manager = PostGradPassManager.from_config(CompilationConfig(**fields))
        return [each.name for each in manager.passes]

    assert names() == ["NoOpEliminationPass", "DefunctionalizationPass", "CleanUpPass"]
    assert names(
        inductor_passes={"post_grad_custom_post_pass": "piecework.runtime.passes:CleanUpPass"},
        pass_config={"clean_up": False, "eliminate_noops": False},
    ) == ["CleanUpPass", "DefunctionalizationPass"]
    off = {"clean_up": False, "eliminate_noops": False, "defunctionalize": False}
    config = CompilationConfig(pass_config=off)
    manager = PostGradPassManager.from_config(config)
    assert manager.passes == ()
    # The slot is taken all the same: Inductor keeps code under the facts that its uuid holds.
    (slot,) = manager.inductor_options(config).items()
    assert slot[0] == "post_grad_custom_post_pass"
    with pass_context(None, "s0 >= 2"):
        under = slot[1].uuid()
    assert under != slot[1].uuid()


def test_a_pass_for_another_slot_is_gated_counted_and_identified() -> None:
    config = CompilationConfig(
        inductor_passes={"joint_custom_pre_pass": OnlySmall(1.0)},
        pass_config={"clean_up": False, "eliminate_noops": False, "defunctionalize": False},
    )
    manager = PostGradPassManager.from_config(config)
    run = manager.inductor_options(config)["joint_custom_pre_pass"]
    run(small_graph())
    assert manager.report().rows() == ()
    with pass_context(Range(1, 8)):
        run(small_graph())
        assert run.uuid() != PostGradPassManager([OnlySmall(2.0)]).uuid()
    assert manager.report().matches("OnlySmall") == 1
