"""A graph whose layers share a trace is compared with the model's own Python. In: stacks whose Python or operators could leave something behind, or tell runs apart by little. Out: the process as it was, and differences seen."""

from __future__ import annotations

import functools
import random
import sys
import threading
from collections.abc import Callable

import numpy
import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import piecework
from piecework.runtime import torch_compat

FOUND = piecework.CompilationConfig(backend="eager", repeated_layers="found")
X = torch.randn(4, 8)
SEEN: list[object] = []


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.b(torch.relu(self.a(x)))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def ends_with(end: Callable[[Stack, torch.Tensor], object]) -> Stack:
    class Ending(Stack):
        def forward(self, x: torch.Tensor) -> object:
            return end(self, super().forward(x))

    return Ending().eval().requires_grad_(False)


def report_of(model: nn.Module) -> str:
    return str(piecework.compile(model, (X.clone(),), config=FOUND).report().layers)


# --- a graph that can't be run to its end ---------------------------------------------------------------


def counted(x: torch.Tensor) -> torch.Tensor:
    return torch.nonzero(x.detach()).sum()


def under(context: Callable[[], object]) -> Callable[[Stack, torch.Tensor], torch.Tensor]:
    def end(model: Stack, x: torch.Tensor) -> torch.Tensor:
        with context():  # type: ignore[attr-defined]
            return x * counted(x)

    return end


def transformed(model: Stack, x: torch.Tensor) -> torch.Tensor:
    return torch.func.grad(lambda row: (row * row).sum() + counted(row))(x)


def mapped(model: Stack, x: torch.Tensor) -> torch.Tensor:
    return torch.func.vmap(lambda row: row * counted(x))(x)


def forward_mode(model: Stack, x: torch.Tensor) -> torch.Tensor:
    return torch.func.jvp(lambda row: row * row * counted(row), (x,), (x,))[1]


ENTERED = {
    "grad": transformed,
    "vmap": mapped,
    "jvp": forward_mode,
    "autocast": under(lambda: torch.autocast("cpu", torch.bfloat16)),
    "inference mode": under(torch.inference_mode),
    "saved tensors": under(lambda: torch.autograd.graph.disable_saved_tensors_hooks("none")),
    "subclasses": under(torch.DisableTorchFunctionSubclass),
}


def state_of_torch() -> tuple[object, ...]:
    kept = torch._C._autograd._saved_tensors_hooks_is_enabled()
    levels = forward_ad._current_level, torch._C._functorch.peek_interpreter_stack()
    modes = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
    return kept, levels, modes, torch._C._is_fwd_grad_enabled(), torch.is_autocast_enabled("cpu")


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", ENTERED)
def test_what_a_graph_enters_is_left_where_it_cannot_be_run(name: str) -> None:
    if torch.__version__ < "2.12" and name in ("grad", "jvp"):
        pytest.skip("this torch's Dynamo counts nothing inside of a transform")
    model, before = ends_with(ENTERED[name]), state_of_torch()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        assert "can't be seen without data: aten.nonzero" in report_of(model)
    assert state_of_torch() == before


# --- what Python keeps ----------------------------------------------------------------------------------


def noisy(model: Stack, x: torch.Tensor) -> torch.Tensor:
    return x + torch.from_numpy(numpy.random.rand(8))


def test_nothing_is_drawn_from_numpy_or_python() -> None:
    numpys, pythons = numpy.random.get_state()[1:3], random.getstate()  # type: ignore[index]
    piecework.compile(ends_with(noisy), (X.clone(),), config=FOUND)
    assert str(numpy.random.get_state()[1:3]) == str(numpys)  # type: ignore[index]
    assert random.getstate() == pythons


@functools.lru_cache(maxsize=8)
def lock_of(name: str) -> list[str]:
    return [name]


@functools.lru_cache(maxsize=8)
def table_of(size: int) -> torch.Tensor:
    return torch.arange(float(size))


def looking_up(model: Stack, x: torch.Tensor) -> torch.Tensor:
    return x + table_of(x.shape[1]) + len(lock_of("inside"))


def test_functions_forget_no_more_than_what_is_fake() -> None:
    lock = lock_of("outside")
    assert report_of(ends_with(looking_up)).startswith("one trace served 4")
    assert lock_of("outside") is lock
    assert type(table_of(8)) is torch.Tensor


def without_dynamo(model: Stack, x: torch.Tensor) -> torch.Tensor:
    if not torch.compiler.is_dynamo_compiling():
        SEEN.append(x)
    return x


renamed = torch.compiler.is_dynamo_compiling


def without_dynamo_by_another_name(model: Stack, x: torch.Tensor) -> torch.Tensor:
    return x if renamed() else SEEN.append(x) or x


@pytest.mark.parametrize("end", [without_dynamo, without_dynamo_by_another_name])
def test_code_that_asks_for_dynamo_is_not_run_without_it(
    end: Callable[[Stack, torch.Tensor], torch.Tensor],
) -> None:
    assert "asks torch.compiler.is_dynamo_compiling" in report_of(ends_with(end))
    assert not SEEN


def test_threads_do_not_leave_each_other_compiling() -> None:
    """Each puts back what the other one set."""
    turns, inside = threading.Event(), threading.Event()

    def first() -> None:
        with torch_compat.computed([], {}):
            inside.set()
            turns.wait(0.3)

    def second() -> None:
        inside.wait(10)
        with torch_compat.computed([], {}):
            turns.set()

    threads = [threading.Thread(target=each) for each in (first, second)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(60)
    assert not torch.compiler.is_compiling()


# --- what the comparison sees ---------------------------------------------------------------------------


@torch.library.custom_op("compared::note", mutates_args=())
def note(x: torch.Tensor, name: str) -> None:
    SEEN.append(name)


note.register_fake(lambda x, name: None)


def runs_alike(
    one: Callable[[torch.Tensor], object], other: Callable[[torch.Tensor], object]
) -> bool:
    """Whether two functions are seen to compute the same."""
    numbers: dict[tuple[object, ...], int] = {}
    found = []
    for each in (one, other):
        with torch_compat.computed([X], numbers) as run:
            result = each(X)
        known = run.of(result) if isinstance(result, torch.Tensor) else None
        found.append((known, run.writes(), run.effects()))
    return found[0] == found[1]


def written(*order: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Writes to views of one memory that were made before, in an order."""

    def run(x: torch.Tensor) -> torch.Tensor:
        base = x.clone()
        views = [base[0], base.as_strided((2, 8), (8, 1)), base.t(), base]
        for each in order:
            views[each].add_(each + 1).mul_(2)
        return views[1] + 1

    return run


def drawn_twice(x: torch.Tensor) -> torch.Tensor:
    return torch.rand(8) - torch.rand(8)


def drawn_once(x: torch.Tensor) -> torch.Tensor:
    return (drawn := torch.rand(8)) - drawn


def constant(value: list[float], **kind: object) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: x + torch.tensor(value, **kind)  # type: ignore[arg-type]


def noted(*names: str) -> Callable[[torch.Tensor], None]:
    def run(x: torch.Tensor) -> None:
        for each in names:
            note(x, each)

    return run


APART: dict[str, tuple[Callable[[torch.Tensor], object], Callable[[torch.Tensor], object]]] = {
    "draws": (drawn_twice, drawn_once),
    "notes": (noted("a", "b"), noted("a", "c")),
    "order of notes": (noted("a", "b"), noted("b", "a")),
    "number of notes": (noted("a"), noted("a", "a")),
    "sign of zero": (constant([0.0]), constant([-0.0])),
    "kind of constant": (constant([1.0]), constant([1.0], dtype=torch.float64)),
    "written": (written(0, 1), written(1, 0)),
    "written by a view": (written(2), written(3)),
    "several results": (lambda x: x.sort()[0], lambda x: x.sort()[1]),
    "into out": (lambda x: torch.add(x, 1, out=x), lambda x: torch.add(x, 2, out=x)),
    "to each of a list": (
        lambda x: torch._foreach_add([x[0], x[1]], 1.0)[0],
        lambda x: torch._foreach_add([x[1], x[0]], 1.0)[0],
    ),
    "in each of a list": (
        lambda x: torch._foreach_add_([x[0], x[1]], [1.0, 2.0]),
        lambda x: torch._foreach_add_([x[0], x[1]], [2.0, 1.0]),
    ),
    "by name": (lambda x: x.sum(dim=0, keepdim=True), lambda x: x.sum(dim=0)[None]),
    "integers": (lambda x: x + 1, lambda x: x + 1.0),
}


@pytest.mark.parametrize("name", APART)
def test_runs_that_differ_by_little_are_told_apart(name: str) -> None:
    one, other = APART[name]
    assert runs_alike(one, one)
    assert runs_alike(other, other)
    assert not runs_alike(one, other)


def not_a_number(model: Stack, x: torch.Tensor) -> object:
    return x, float("nan"), -0.0, x.shape[0], None, "text"


def test_plain_results_are_compared_as_values() -> None:
    assert report_of(ends_with(not_a_number)).startswith("one trace served 4")


def test_large_constants_are_no_text() -> None:
    large, numbers = torch.arange(2.0**21), {}
    with torch_compat.computed([], numbers):
        large + 1
    assert sum(map(sys.getsizeof, numbers)) < 10_000


# --- graphs that compute something else -----------------------------------------------------------------


def plainly(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    one, two = layer.a(x).chunk(2, -1)
    return torch.cat([torch.softmax(one @ two.T, -1) @ two, one], -1) + layer.b(x) * 0.5


def by_views(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    row, column = (base := layer.a(x))[0], base[:, 1]
    base.add_(layer.b.bias)
    row.mul_(2)
    column.copy_(row[:4])
    return base * 0.5 + row


def by_several(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    values, order = torch.sort(layer.a(x))
    each = torch._foreach_add([values, layer.b(x)], [x, values])
    return each[0] - x.gather(1, order) * each[1]


def by_chance(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return layer.a(x) * torch.rand(8) + torch.rand(8) - layer.b(x)


def changed(graph: torch.fx.Graph, chosen: random.Random) -> bool:
    """Give one node another operand of the same kind, computed before."""
    nodes = [n for n in graph.nodes if n.op in ("call_function", "call_method")]
    node = chosen.choice([n for n in nodes if n.all_input_nodes])
    old = chosen.choice(node.all_input_nodes)
    kinds = {n: kind_of(n.meta.get("example_value")) for n in graph.nodes if n < node}
    others = [n for n, kind in kinds.items() if kind == kinds[old] and kind and n is not old]
    if others:
        node.replace_input_with(old, chosen.choice(others))
    return bool(others)


def kind_of(value: object) -> tuple[object, ...]:
    is_tensor = isinstance(value, torch.Tensor)
    return (value.dtype, tuple(map(int, value.shape))) if is_tensor else ()


def computed_by(gm: torch.fx.GraphModule, given: list[torch.Tensor]) -> list[torch.Tensor]:
    torch.manual_seed(0)
    own = [each.clone() for each in given]
    return [*gm(*own), *own]


@pytest.mark.nightly
@pytest.mark.parametrize("body", [plainly, by_views, by_several, by_chance])
def test_a_graph_that_computes_something_else_is_told(
    body: Callable[[nn.Module, torch.Tensor], torch.Tensor],
) -> None:
    class Made(Layer):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return body(self, x)

    model = nn.Sequential(*(Made() for _ in range(4))).eval().requires_grad_(False)
    graphs: list[torch.fx.GraphModule] = []
    found: list[list[torch.Tensor]] = []

    def keep(gm: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
        graphs.append(gm), found.append(inputs)
        return gm

    torch.compile(model, backend=keep, fullgraph=True, dynamic=False)(X)
    (gm,), (given,) = graphs, found
    chosen, told = random.Random(0), 0
    expected = computed_by(gm, given)
    for _ in range(60):
        other = torch.fx.GraphModule(gm, torch.fx.Graph())
        other.graph.graph_copy(gm.graph, copies := {})
        output = next(n for n in gm.graph.nodes if n.op == "output")
        other.graph.output(torch.fx.map_arg(output.args[0], copies.__getitem__))
        if not changed(other.graph, chosen):
            continue
        other.recompile()
        numbers: dict[tuple[object, ...], int] = {}
        runs = []
        for each in (gm, other):
            with torch_compat.computed(given, numbers) as run:
                outputs = torch_compat.outputs_of(each, given)
            runs.append((list(map(run.of, outputs)), run.writes(), run.effects()))
        pairs = zip(computed_by(other, given), expected, strict=True)
        if not all(torch.equal(one, two) for one, two in pairs):
            told += 1
            assert runs[0] != runs[1]
    assert told > 10
