"""Random FX graphs: every node runs as it is added, so that only what the interpreter can run gets in."""

from __future__ import annotations

import copy
import operator
from collections import namedtuple
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.fx
from fx_graphs import module_of, problems
from hypothesis import HealthCheck
from hypothesis import strategies as st

from piecework.codegen import LowerOptions, StitchedSource
from piecework.codegen.graph.structure import attribute_of
from piecework.golden.execute import run_module

T = TypeVar("T")
Pair = namedtuple("Pair", ["left", "right"])
SETTINGS = {
    "deadline": None,
    "suppress_health_check": [
        *(HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much)
    ],
}


def gather(*args: object, **kwargs: object) -> tuple[object, ...]:
    """Takes anything in any nesting, and shows what it got."""
    return (_shown(args), _shown(kwargs))


def _shown(value: object) -> object:
    """``value`` with slices as lists, so that tensors in them can be compared."""
    if isinstance(value, slice):
        return ["slice", *map(_shown, (value.start, value.stop, value.step))]
    if isinstance(value, dict):
        return {key: _shown(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        items = [_shown(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else items
    return value


def first_tensor(*args: object, **kwargs: object) -> torch.Tensor:
    """The first tensor in any nesting, changed a little."""
    stack: list[object] = [(args, kwargs)]
    while stack:
        value = stack.pop()
        if isinstance(value, torch.Tensor):
            return value * 1.5
        if isinstance(value, (list, tuple)):
            stack.extend(reversed(value))
        elif isinstance(value, dict):
            stack.extend(reversed(list(value.values())))
        elif isinstance(value, slice):
            stack.extend((value.step, value.stop, value.start))
    return torch.zeros(())


def _is_large(value: object) -> bool:
    """Containers of containers double with every step, and so do tensors that are broadcast."""
    stack, seen = [value], 0
    while stack and seen < 300:
        item = stack.pop()
        seen += item.numel() if isinstance(item, torch.Tensor) and not stack and seen == 0 else 1
        if isinstance(item, dict):
            stack.extend(item.values())
        elif isinstance(item, (tuple, list)):
            stack.extend(item)
    return seen >= 300


HOSTILE = [
    *("torch", "len", "lambda", "x", "__vllm_submods__", "execution_fn", "a b", "é", "", "_1"),
    "sin",
]
LITERALS = [
    *(0, 1, -1, 2**70, True, False, None, ..., 0.5, -0.0, 1e300, 2j, 1 - 2j, -1j),
    *("s", "'\"\n", b"\x00"),
]
OBJECTS: list[object] = [
    *(torch.float64, torch.device("cpu"), float("inf"), float("nan")),
    *(torch.Size([2]), range(3), Pair(1, 2)),
]
UNARY = (
    *(torch.relu, torch.sin, torch.ops.aten.neg.default, torch.ops.aten.cos),
    *(torch.nn.functional.gelu, operator.neg, torch.clone),
)
BINARY = (
    *(operator.add, operator.sub, operator.mul, operator.lt, operator.eq, operator.pow),
    *(torch.add, torch.ops.aten.mul.Tensor),
)
ON_NUMBERS = (
    *(operator.add, operator.mul, operator.floordiv, operator.neg, operator.sub, operator.not_),
    *(operator.pow, max, min, abs),
)
#: For the placeholders of every graph.
INPUTS = (torch.arange(12.0).reshape(4, 3), torch.full((4, 3), 3.0), 2)
KEYWORDS = ["alpha", "from", "a-b", "dim", "self", "print", "{{ x }}", "__debug__", "None"]


@dataclass
class Program:
    """A graph under construction."""

    draw: st.DrawFn
    depth: int = 0
    graph: torch.fx.Graph = field(default_factory=torch.fx.Graph)
    root: torch.nn.Module = field(default_factory=torch.nn.Module)
    values: dict[torch.fx.Node, object] = field(default_factory=dict)
    attributes: int = 0
    shown: bool = False  # whether slices are shown as lists, so that they may hold tensors

    def pick(self, options: Sequence[T]) -> T:
        return self.draw(st.sampled_from(options))

    def flip(self) -> bool:
        return self.draw(st.booleans())

    def count(self, low: int, high: int) -> range:
        return range(self.draw(st.integers(low, high)))

    def nodes(self, *kinds: type) -> list[torch.fx.Node]:
        return [node for node, value in self.values.items() if isinstance(value, kinds)]

    def attribute(self, value: object) -> str:
        name = f"attribute_{self.attributes}"
        self.attributes += 1
        if self.flip():
            holder = torch.nn.Module()
            self.root.add_module(f"holder_{self.attributes}", holder)
            setattr(holder, name, value)
            return f"holder_{self.attributes}.{name}"
        setattr(self.root, name, value)
        return name

    def add(
        self,
        op: str,
        target: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> torch.fx.Node | None:
        """Execute and append; None if it can't be executed."""
        kwargs = kwargs or {}
        real_args = torch.fx.node.map_arg(args, lambda n: self.values[n])
        real_kwargs = torch.fx.node.map_arg(kwargs, lambda n: self.values[n])
        try:
            if op == "call_function":
                value = target(*real_args, **real_kwargs)  # type: ignore[operator]
            elif op == "call_method":
                value = getattr(real_args[0], str(target))(*real_args[1:], **real_kwargs)
            elif op == "call_module":
                value = run_module(self.root.get_submodule(str(target)), *real_args, **real_kwargs)
            else:
                value = attribute_of(self.root, str(target))
        except Exception:  # noqa: BLE001 - whatever it is, this node is not part of a valid graph
            return None
        if _is_large(value):
            return None
        node = self.graph.create_node(op, target, args, kwargs)  # type: ignore[arg-type]
        self.values[node] = value
        if type(value) in (tuple, list) and self.flip():
            node.meta["example_value"] = value
        if self.draw(st.integers(0, 9)) == 0:
            node.name = self.pick(HOSTILE)
        return node

    def argument(self, depth: int = 0) -> object:
        choice = self.draw(st.integers(0, 9 if depth < 3 else 5))
        if choice <= 3 and self.values:
            return self.pick(list(self.values))
        if choice == 4:
            return self.pick(OBJECTS)
        if choice <= 5:
            return self.pick(LITERALS)
        items = [self.argument(depth + 1) for _ in self.count(0, 3)]
        if choice == 6:
            return tuple(items)
        if choice == 7:
            return items
        if choice == 8:
            return {self.pick(["k", 1, "'", None, "l"]): item for item in items}
        if self.flip():
            return Pair(*[*items, 1, 2][:2])
        if not self.shown:
            return slice(None, 1)
        return slice(*[*items, None][:3])

    def index(self) -> object:
        part = self.pick(["int", "slice", "ellipsis", "none", "tuple", "empty", "list"])
        number = self.pick([0, 1, -1, *self.nodes(int)])
        if part == "slice":
            ends = [None, 0, 1, 2, -1, *self.nodes(int)]
            return slice(self.pick(ends), self.pick(ends), self.pick([None, 1, 2]))
        if part == "tuple":
            return tuple(self.index() for _ in self.count(1, 2))
        return {"int": number, "ellipsis": ..., "none": None, "empty": (), "list": [number]}[part]

    def step(self) -> None:
        getattr(self, self.pick(STEPS))()

    # --- kinds of nodes ----------------------------------------------------------------------------

    def tensor(self) -> torch.fx.Node:
        return self.pick(self.nodes(torch.Tensor))

    def scalar(self) -> object:
        return self.pick([1, 2, -1, 0.5, True, *self.nodes(int)])

    def unary(self) -> None:
        self.add("call_function", self.pick(UNARY), (self.tensor(),))

    def binary(self) -> None:
        target = self.pick(BINARY)
        sides = [self.tensor(), self.pick([self.tensor(), self.scalar()])]
        if self.flip():
            sides.reverse()
        kwargs: dict[str, object] = {"alpha": 2} if target is torch.add and self.flip() else {}
        self.add("call_function", target, tuple(sides), kwargs)

    def numbers(self) -> None:
        target = self.pick(ON_NUMBERS)
        count = 1 if target in (operator.neg, abs, operator.not_) else 2
        values = tuple(self.pick([1, 2, -3, *self.nodes(int)]) for _ in range(count))
        if all(abs(v if isinstance(v, int) else self.values[v]) < 9 for v in values):  # type: ignore[index, operator]
            self.add("call_function", target, values)

    def sizes(self) -> None:
        x = self.tensor()
        if self.flip():
            self.add("call_method", "size", self.pick([(x,), (x, 0), (x, -1)]))
        else:
            shape, rank = (getattr, (x, "shape")), (getattr, (x, "ndim"))
            size = torch.ops.aten.sym_size.int, (x, 0)
            self.add("call_function", *self.pick([shape, size, (len, (x,)), rank]))

    def views(self) -> None:
        x = self.tensor()
        more = ("unsqueeze", 0), ("expand_as", self.tensor()), ("contiguous",)
        method, *args = self.pick([("view", -1), ("reshape", 2, -1), ("t",), *more])
        self.add("call_method", method, (x, *args))

    def getitem(self) -> None:
        source = self.pick(self.nodes(torch.Tensor, tuple, list))
        if self.draw(st.integers(0, 4)) == 0:  # of a literal
            parts = [source, self.tensor(), self.argument(2)]
            source = self.pick([tuple(parts), parts])
        self.add("call_function", operator.getitem, (source, self.index()))

    def split(self) -> None:
        methods = ("call_method", "chunk", 2), ("call_method", "unbind")
        split = "call_function", torch.ops.aten.split.Tensor, 2
        op, target, *args = self.pick([*methods, split, ("call_function", torch.aminmax)])
        made = self.add(op, target, (self.tensor(), *args))
        if made is None:
            return
        for _ in self.count(0, 3):
            self.add("call_function", operator.getitem, (made, self.pick([0, 1, -1, 2])))

    def mutate(self) -> None:
        x = self.tensor()
        choice = self.pick(["add_", "iadd", "setitem", "out", "mul_"])
        if choice in ("add_", "mul_"):
            self.add("call_method", choice, (x, self.scalar()))
        elif choice == "iadd":
            target = self.pick([operator.iadd, operator.imul, operator.isub])
            self.add("call_function", target, (x, self.scalar()))
        elif choice == "setitem":
            self.add("call_function", operator.setitem, (x, self.index(), self.scalar()))
        else:
            self.add("call_function", torch.sin, (x,), {"out": x})

    def lists(self) -> None:
        made = self.pick(self.nodes(list) or [None])
        if made is None or self.flip():
            self.add("call_function", list, (tuple(self.argument(2) for _ in range(2)),))
        elif self.flip():
            self.add("call_method", "append", (made, self.pick([self.tensor(), self.scalar()])))
        else:
            self.add("call_function", operator.setitem, (made, 0, self.tensor()))

    def anything(self) -> None:
        self.shown = True
        args = tuple(self.argument() for _ in self.count(0, 3))
        names = dict.fromkeys(self.pick(KEYWORDS) for _ in self.count(0, 3))
        kwargs = {name: self.argument() for name in names}
        self.add("call_function", self.pick([gather, first_tensor, first_tensor]), args, kwargs)
        self.shown = False

    def get_attr(self) -> None:
        parameter = torch.nn.Parameter(torch.full((3,), 2.0), requires_grad=False)
        value = self.pick([torch.ones(4, 3), parameter, 1e-5, torch.float64])
        self.add("get_attr", self.attribute(value))

    def leaf(self) -> None:
        modules = self.root.named_modules()
        names = [name for name, module in modules if isinstance(module, torch.nn.ReLU)]
        if not names or self.flip():
            names = [self.attribute(torch.nn.ReLU())]
        self.add("call_module", self.pick(names), (self.tensor(),))

    def graph_module(self) -> None:
        if self.depth >= 2:
            return
        children = self.root.named_children()
        known = [name for name, child in children if isinstance(child, torch.fx.GraphModule)]
        if known and self.flip():
            name = self.pick(known)
        else:
            kind = self.pick(["one", "two", "nested", "none", "lifted", "lifted"])
            name = f"graph_{len(known)}"
            self.root.add_module(name, _callee(self, kind))
        # Tensors only: integers that are raised to each other inside would grow without end.
        a, b = self.tensor(), self.tensor()
        if any(self.values[each].shape != (4, 3) for each in (a, b)):  # type: ignore[attr-defined]
            _forget_values(self.root.get_submodule(name))
        args, kwargs = ((a, b), {}) if self.flip() else ((a,), {"b": b})
        made = self.add("call_module", name, args, kwargs)
        if made is not None and isinstance(self.values[made], (tuple, list)):
            for _ in self.count(0, 2):
                self.add("call_function", operator.getitem, (made, self.pick([0, 1, -1])))


STEPS = [
    "unary", "binary", "numbers", "sizes", "views", "getitem", "getitem", "split", "mutate", "lists", "anything",
    "anything", "get_attr", "leaf", "graph_module", "graph_module",
]  # fmt: skip


def _forget_values(module: torch.nn.Module) -> None:
    """What was recorded for inputs of one shape is not true of others."""
    for each in module.modules():
        for node in each.graph.nodes if isinstance(each, torch.fx.GraphModule) else ():
            node.meta.pop("example_value", None)


def _callee(parent: Program, kind: str) -> torch.fx.GraphModule:
    """A graph of two inputs, ``a`` and ``b``, to be called by another."""
    inner = Program(parent.draw, depth=parent.depth + 1)
    a, b = inner.graph.placeholder("a"), inner.graph.placeholder("b")
    inner.values = {a: torch.ones(4, 3), b: torch.ones(4, 3)}
    if kind == "one":
        result: object = inner.add(
            "call_function", torch.add, (a, b), {"alpha": parent.pick([1, 2])}
        )
    elif kind == "none":
        inner.add("call_function", operator.iadd, (a, 1))
        result = None
    elif kind == "two":
        result = parent.pick([(a, b), [a, b], (a, [b])])
    elif kind == "lifted":
        c = inner.add("call_function", torch.mul, (a, parent.pick([1, 2, 2.0, True])))
        d = inner.add("call_method", "sub", (c, b), {"alpha": parent.pick([1, 2])})
        result = parent.pick([(c, d), d, {"c": c, "d": [d]}])
    else:
        for _ in range(3):
            inner.step()
        result = inner.argument()
    inner.graph.output(result)  # type: ignore[arg-type]
    return module_of(inner.graph, inner.root)


@st.composite
def programs(draw: st.DrawFn) -> tuple[torch.fx.GraphModule, LowerOptions]:
    program = Program(draw)
    for name, value in zip("xyn", copy.deepcopy(INPUTS), strict=True):
        program.values[program.graph.placeholder(name)] = value
    for _ in program.count(1, 9):
        program.step()
    program.graph.output(program.argument())  # type: ignore[arg-type]
    gm = module_of(program.graph, program.root)
    modules = [str(node.target) for node in program.graph.nodes if node.op == "call_module"]
    submods = [name for name in modules if program.flip()] if program.flip() else None
    bound = {"y": "weights.y"} if program.flip() else {}
    return gm, LowerOptions(submods=submods, bound=bound, emit_del=program.pick(range(5)) > 0)


def surprises(
    gm: torch.fx.GraphModule, source: StitchedSource, code: str | None = None
) -> list[str]:
    """Where ``code`` does something else than ``gm``, if that can be run at all."""
    found = problems(gm, source, INPUTS, code=code)
    return [each for each in found if "the interpreter fails" not in each]
