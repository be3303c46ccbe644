"""Random FX graphs: the emitted function does what the interpreter does, is proved, and is the same text every time."""

from __future__ import annotations

import operator
import os
from collections import namedtuple
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import torch.fx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from piecework.codegen import LowerOptions, StitchedSource, generate_source, verify
from piecework.codegen.plan.render import format_source
from piecework.golden.cases import Case, LoadedCase
from piecework.golden.execute import differences, run_module

EXAMPLES = int(os.environ.get("PIECEWORK_RANDOM_GRAPHS", "200"))
Pair = namedtuple("Pair", ["left", "right"])


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
    stack: list[object] = [*reversed(list(kwargs.values())), *reversed(args)]
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
    "torch",
    "len",
    "lambda",
    "x",
    "__vllm_submods__",
    "execution_fn",
    "a b",
    "é",
    "",
    "_1",
    "sin",
]
LITERALS = [
    0,
    1,
    -1,
    2**70,
    True,
    False,
    None,
    ...,
    0.5,
    -0.0,
    1e300,
    2j,
    1 - 2j,
    -1j,
    "s",
    "'\"\n",
    b"\x00",
]
OBJECTS: list[object] = [
    torch.float64,
    torch.device("cpu"),
    float("inf"),
    float("nan"),
    torch.Size([2]),
    range(3),
    Pair(1, 2),
]
KEYWORDS = ["alpha", "from", "a-b", "dim", "self", "print", "{{ x }}", "__debug__", "None"]


@dataclass
class Program:
    """A graph under construction; every node is executed as it is added, so that only what runs gets in."""

    draw: Callable[[st.SearchStrategy[object]], object]
    depth: int = 0
    graph: torch.fx.Graph = field(default_factory=torch.fx.Graph)
    root: torch.nn.Module = field(default_factory=torch.nn.Module)
    values: dict[torch.fx.Node, object] = field(default_factory=dict)
    attributes: int = 0
    shown: bool = False  # whether slices are shown as lists, so that they may hold tensors

    def pick(self, options: Sequence[object]) -> object:
        return options[int(self.draw(st.integers(0, len(options) - 1)))]  # type: ignore[call-overload]

    def flip(self) -> bool:
        return bool(self.draw(st.booleans()))

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
                value = self.root
                for part in str(target).split("."):
                    value = getattr(value, part)
        except Exception:  # noqa: BLE001 - whatever it is, this node is not part of a valid graph
            return None
        if _is_large(value):
            return None
        node = self.graph.create_node(op, target, args, kwargs)  # type: ignore[arg-type]
        self.values[node] = value
        if type(value) in (tuple, list) and self.flip():
            node.meta["example_value"] = value
        if self.draw(st.integers(0, 9)) == 0:
            node.name = str(self.pick(HOSTILE))
        return node

    def argument(self, depth: int = 0) -> object:
        choice = int(self.draw(st.integers(0, 9 if depth < 3 else 5)))  # type: ignore[call-overload]
        if choice <= 3 and self.values:
            return self.pick(list(self.values))
        if choice == 4:
            return self.pick(OBJECTS)
        if choice <= 5:
            return self.pick(LITERALS)
        items = [self.argument(depth + 1) for _ in range(int(self.draw(st.integers(0, 3))))]  # type: ignore[call-overload]
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
            return tuple(self.index() for _ in range(int(self.draw(st.integers(1, 2)))))  # type: ignore[call-overload]
        return {"int": number, "ellipsis": ..., "none": None, "empty": (), "list": [number]}.get(
            str(part)
        )

    def step(self) -> None:
        getattr(self, str(self.pick(STEPS)))()

    # --- kinds of nodes ----------------------------------------------------------------------------

    def tensor(self) -> torch.fx.Node:
        return self.pick(self.nodes(torch.Tensor))  # type: ignore[return-value]

    def scalar(self) -> object:
        return self.pick([1, 2, -1, 0.5, True, *self.nodes(int)])

    def unary(self) -> None:
        target = self.pick(
            [
                torch.relu,
                torch.sin,
                torch.ops.aten.neg.default,
                torch.ops.aten.cos,
                torch.nn.functional.gelu,
                operator.neg,
                torch.clone,
            ]
        )
        self.add("call_function", target, (self.tensor(),))

    def binary(self) -> None:
        target = self.pick(
            [
                operator.add,
                operator.sub,
                operator.mul,
                torch.add,
                torch.ops.aten.mul.Tensor,
                operator.lt,
                operator.eq,
                operator.pow,
            ]
        )
        sides = [self.tensor(), self.pick([self.tensor(), self.scalar()])]
        if self.flip():
            sides.reverse()
        kwargs: dict[str, object] = {"alpha": 2} if target is torch.add and self.flip() else {}
        self.add("call_function", target, tuple(sides), kwargs)

    def numbers(self) -> None:
        target = self.pick(
            [
                operator.add,
                operator.mul,
                operator.floordiv,
                operator.neg,
                operator.sub,
                max,
                min,
                abs,
                operator.not_,
                operator.pow,
            ]
        )
        count = 1 if target in (operator.neg, abs, operator.not_) else 2
        values = tuple(self.pick([1, 2, -3, *self.nodes(int)]) for _ in range(count))
        if all(abs(v if isinstance(v, int) else self.values[v]) < 9 for v in values):  # type: ignore[index, operator]
            self.add("call_function", target, values)

    def sizes(self) -> None:
        x = self.tensor()
        if self.flip():
            self.add("call_method", "size", self.pick([(x,), (x, 0), (x, -1)]))  # type: ignore[arg-type]
        else:
            target, args = self.pick([(getattr, (x, "shape")), (torch.ops.aten.sym_size.int, (x, 0)), (len, (x,)), (getattr, (x, "ndim"))])  # type: ignore[misc]
            self.add("call_function", target, args)

    def views(self) -> None:
        x = self.tensor()
        method, args = self.pick([("view", (-1,)), ("reshape", (2, -1)), ("t", ()), ("unsqueeze", (0,)), ("expand_as", (self.tensor(),)), ("contiguous", ())])  # type: ignore[misc]
        self.add("call_method", method, (x, *args))

    def getitem(self) -> None:
        source = self.pick(self.nodes(torch.Tensor, tuple, list))
        if self.draw(st.integers(0, 4)) == 0:  # of a literal
            parts = [source, self.tensor(), self.argument(2)]
            source = self.pick([tuple(parts), parts])
        self.add("call_function", operator.getitem, (source, self.index()))

    def split(self) -> None:
        op, target, args = self.pick([("call_method", "chunk", (2,)), ("call_method", "unbind", ()), ("call_function", torch.ops.aten.split.Tensor, (2,)), ("call_function", torch.aminmax, ())])  # type: ignore[misc]
        made = self.add(op, target, (self.tensor(), *args))
        if made is None:
            return
        for _ in range(int(self.draw(st.integers(0, 3)))):  # type: ignore[call-overload]
            self.add("call_function", operator.getitem, (made, self.pick([0, 1, -1, 2])))

    def mutate(self) -> None:
        x = self.tensor()
        choice = self.pick(["add_", "iadd", "setitem", "out", "mul_"])
        if choice in ("add_", "mul_"):
            self.add("call_method", choice, (x, self.scalar()))
        elif choice == "iadd":
            self.add(
                "call_function",
                self.pick([operator.iadd, operator.imul, operator.isub]),
                (x, self.scalar()),
            )
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
        args = tuple(self.argument() for _ in range(int(self.draw(st.integers(0, 3)))))  # type: ignore[call-overload]
        names = list(dict.fromkeys(str(self.pick(KEYWORDS)) for _ in range(int(self.draw(st.integers(0, 3))))))  # type: ignore[call-overload]
        kwargs = {name: self.argument() for name in names}
        self.add("call_function", self.pick([gather, first_tensor, first_tensor]), args, kwargs)
        self.shown = False

    def get_attr(self) -> None:
        value = self.pick(
            [
                torch.ones(4, 3),
                torch.nn.Parameter(torch.full((3,), 2.0), requires_grad=False),
                1e-5,
                torch.float64,
            ]
        )
        self.add("get_attr", self.attribute(value))

    def leaf(self) -> None:
        names = [
            name for name, module in self.root.named_modules() if isinstance(module, torch.nn.ReLU)
        ]
        if not names or self.flip():
            names = [self.attribute(torch.nn.ReLU())]
        self.add("call_module", self.pick(names), (self.tensor(),))

    def graph_module(self) -> None:
        if self.depth >= 2:
            return
        known = [
            name
            for name, module in self.root.named_children()
            if isinstance(module, torch.fx.GraphModule)
        ]
        if known and self.flip():
            name = str(self.pick(known))
        else:
            callee = _callee(
                self, str(self.pick(["one", "two", "nested", "none", "lifted", "lifted"]))
            )
            name = f"graph_{len(known)}"
            self.root.add_module(name, callee)
        call = self.pick(["positional", "keyword"])
        # Tensors only: integers that are raised to each other inside would grow without end.
        a, b = self.tensor(), self.tensor()
        if any(self.values[each].shape != (4, 3) for each in (a, b)):  # type: ignore[attr-defined]
            _forget_values(self.root.get_submodule(name))
        args, kwargs = ((a, b), {}) if call == "positional" else ((a,), {"b": b})
        made = self.add("call_module", name, args, kwargs)
        if made is not None and isinstance(self.values[made], (tuple, list)):
            for _ in range(int(self.draw(st.integers(0, 2)))):  # type: ignore[call-overload]
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
    return _module_of(inner)


def _module_of(program: Program) -> torch.fx.GraphModule:
    """FX cannot write all of these graphs as source, so that it is not asked to; it can interpret them."""
    gm = torch.fx.GraphModule(program.root, torch.fx.Graph())
    for name, child in program.root.named_children():
        gm.add_module(name, child)
    for name, value in vars(program.root).items():
        if name.startswith("attribute_"):
            setattr(gm, name, value)
    for name, parameter in program.root.named_parameters(recurse=False):
        gm.register_parameter(name, parameter)
    gm._graph = program.graph
    return gm


@st.composite
def programs(
    draw: Callable[[st.SearchStrategy[object]], object],
) -> tuple[torch.fx.GraphModule, LowerOptions]:
    program = Program(draw)
    for name, value in (("x", torch.arange(12.0).reshape(4, 3)), ("y", torch.ones(4, 3)), ("n", 2)):
        program.values[program.graph.placeholder(name)] = value
    for _ in range(int(draw(st.integers(1, 9)))):  # type: ignore[call-overload]
        program.step()
    program.graph.output(program.argument())  # type: ignore[arg-type]
    gm = _module_of(program)
    modules = [str(node.target) for node in program.graph.nodes if node.op == "call_module"]
    submods = [name for name in modules if program.flip()] if program.flip() else None
    bound = {"y": "weights.y"} if program.flip() else {}
    return gm, LowerOptions(
        submods=submods, bound=bound, emit_del=bool(program.draw(st.integers(0, 4)))
    )


def loaded(gm: torch.fx.GraphModule, source: StitchedSource, bound: tuple[str, ...]) -> LoadedCase:
    inputs = [(torch.arange(12.0).reshape(4, 3), torch.full((4, 3), 3.0), 2)]
    return LoadedCase(Case("random", Path(".")), gm, source, source.code, bound, inputs)


def check(program: tuple[torch.fx.GraphModule, LowerOptions]) -> None:
    gm, options = program
    source = generate_source(gm, options)
    assert generate_source(gm, options).code == source.code == format_source(source.code)
    assert verify(source, gm) == source.proof
    expected_to_run = differences(loaded(gm, source, tuple(options.bound)))
    assert not [p for p in expected_to_run if "the interpreter fails" not in p], source.code


SETTINGS = {
    "deadline": None,
    "suppress_health_check": [
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.filter_too_much,
    ],
}


@given(programs())
@settings(max_examples=EXAMPLES, **SETTINGS)
def test_a_random_graph_is_emitted_as_the_interpreter_runs_it(
    program: tuple[torch.fx.GraphModule, LowerOptions],
) -> None:
    check(program)


@pytest.mark.nightly
@given(programs())
@settings(max_examples=50_000, **SETTINGS)
def test_many_random_graphs(program: tuple[torch.fx.GraphModule, LowerOptions]) -> None:
    check(program)
