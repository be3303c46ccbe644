"""Random plans of entries. In: hypothesis. Out: plans with every kind of argument, check, pass and result, and calls that keep or break them."""

from __future__ import annotations

import collections
import math
from dataclasses import dataclass, field

import numpy as np
import torch
from hypothesis import strategies as st

from piecework.codegen.entry.plan import (
    EntryPlan,
    FixedValue,
    FromCall,
    FromConst,
    FromItems,
    FromLeaf,
    FromNumber,
    FromOffset,
    FromOutput,
    FromSize,
    FromSymbol,
    FromWeights,
    IntegerInput,
    Items,
    Leaf,
    Node,
    Packed,
    Parameter,
    Passed,
    SameObject,
    Symbol,
    TensorInput,
    Tree,
    UnusedTensor,
    WatchedObject,
)
from piecework.runtime import torch_compat
from piecework.runtime.call.example_call import example_call

CPU = torch.device("cpu")
SYMBOLS = {"s0": 4, "s1": 6, "rows": 3}
#: Texts over those symbols that hold for these numbers.
GUARDS = ("s0 % 2 == 0", "s1 > rows or s0 > 9", "rows != 7 and s0 < 64", "math.floor(s1 / s0) == 1", "s1 % s0 >= 0")  # fmt: skip
NAMES = ("x", "y", "s0", "list", "type", "len", "id", "torch", "weights", "entry", "leaves", "x_0", "bound", "_")  # fmt: skip
FIXED = (None, True, False, 0, 1, 7, -3, 2.5, -2.5, 0.0, -0.0, math.nan, math.inf, 1 + 2j, -1 - 2j, "mean", "it's", 'a"b\'', b"raw", ..., torch.float16, (1, 2), range(3), np.float64(0.0), np.float64(2.5))  # fmt: skip
IN_TREES = tuple(value for value in FIXED if not isinstance(value, tuple))  # it would be flattened
DTYPES = (torch.float32, torch.int64, torch.complex64, torch.bool)


class Odd:
    """Not comparable with anything but itself."""


@dataclass
class _Plan:
    """What was drawn so far."""

    draw: st.DrawFn
    leaves: list[Leaf] = field(default_factory=list)
    tensors: list[int] = field(default_factory=list)
    first: list[int] = field(default_factory=list)  # tensors that are not another argument again
    known: list[str] = field(default_factory=list)

    def node(self, label: str, depth: int = 0) -> Node:
        kinds = ["leaf", "leaf", "leaf", "list", "tuple", "dict", "tree"]
        kind = self.draw(st.sampled_from(kinds if depth < 2 else kinds[:3]))
        count = self.draw(st.integers(0, 3))
        if kind == "leaf":
            return self.leaf(label)
        if kind == "tree":
            keys = [f"k{number}" for number in range(count)]
            _, structure = torch_compat.flatten_tree(collections.OrderedDict.fromkeys(keys, 1))
            leaves = (self.leaf(f"{label}['{key}']", IN_TREES) for key in keys)
            return Tree(label, structure, tuple(leaves))
        names = (0, "one", 2.5) if kind == "dict" else range(3)
        keys = tuple(names[:count])
        children = tuple(self.node(f"{label}[{key!r}]", depth + 1) for key in keys)
        return Items({"list": list, "tuple": tuple, "dict": dict}[kind], label, keys, children)

    def leaf(self, label: str, fixed: tuple[object, ...] = FIXED) -> Leaf:
        kinds = ["tensor", "tensor", "tensor", "unused", "same", "integer", "fixed", "watched"]
        kind = self.draw(st.sampled_from(kinds))
        index = len(self.leaves)
        match kind:
            case "unused":
                assumption = UnusedTensor(self.draw(st.sampled_from(DTYPES)), CPU, 2)
            case "same" if self.first:
                other = self.draw(st.sampled_from(self.first))
                assumption = SameObject(other, self.leaves[other].label)
            case "integer":
                texts = [*SYMBOLS, *(["s0 * 2", "s1 // 2 + 1"] if self.complete else [])]
                assumption = IntegerInput(self.draw(st.sampled_from(texts)))
                self.known.append(assumption.symbol)
            case "fixed":
                assumption = FixedValue(self.draw(st.sampled_from(fixed)))
            case "watched":
                assumption = WatchedObject()
            case _:
                assumption = self.tensor()
        if isinstance(assumption, (TensorInput, UnusedTensor)):
            self.first.append(index)
            self.tensors += [index] if isinstance(assumption, TensorInput) else []
        self.leaves.append(Leaf(index, label, assumption))
        return self.leaves[-1]

    @property
    def complete(self) -> bool:
        return set(SYMBOLS) <= set(self.known)

    def tensor(self) -> TensorInput:
        computed = ["s0 + 1", "-(-s1 // rows)"] if self.complete else []
        sizes = tuple(self.draw(st.lists(st.sampled_from([*SYMBOLS, 2, 3, *computed]), max_size=3)))
        self.known += [size for size in sizes if size in SYMBOLS]
        strides = None
        if sizes and self.draw(st.booleans()):
            strides = (self.draw(st.sampled_from([64, 128])), *(1 for _ in sizes[1:]))
            if self.complete:
                strides = self.draw(st.sampled_from([strides, ("s0", *strides[1:]), ("s1 * 4", *strides[1:])]))  # fmt: skip
        dtype = self.draw(st.sampled_from(DTYPES))
        floats = dtype in (torch.float32, torch.complex64)
        grad = self.draw(st.sampled_from([None, False, True])) if floats else None
        kind = self.draw(st.sampled_from([torch.Tensor, torch.Tensor, torch.nn.Parameter]))
        item = None
        if not sizes and dtype is torch.int64:
            item = self.draw(st.sampled_from([None, 0, *(["s1 - s1"] if self.complete else [])]))
        return TensorInput(dtype, CPU, sizes, strides, kind if floats else torch.Tensor, grad, item)


@st.composite
def plans(draw: st.DrawFn) -> EntryPlan:
    """A plan whose symbols are all found, or are not mentioned."""
    state = _Plan(draw)
    parameters = _parameters(draw, state)
    found = [name for name in SYMBOLS if name in state.known]
    guards = [text for text in GUARDS if all(n in found or n not in text for n in SYMBOLS)]
    chosen = draw(st.lists(st.sampled_from(guards), unique=True)) if guards else []
    bound = st.sampled_from([(None, None), (2, None), (None, 64), (0, 64)])
    symbols = tuple(Symbol(name, *draw(bound)) for name in found)
    passed = draw(st.lists(st.sampled_from(_passed(state, found)), max_size=4))
    outputs = draw(st.integers(0, 3))
    names = draw(st.lists(st.sampled_from(NAMES), min_size=outputs, max_size=outputs))
    numbers = [FromSymbol(name) for name in found]
    apart = ()
    if len(state.first) > 1 and draw(st.booleans()):
        apart = ((state.first[0], tuple(state.first[1:])),)
    return EntryPlan(
        banner=("model: random",),
        parameters=parameters,
        symbols=symbols,
        guards=tuple(chosen),
        passed=tuple(passed),
        outputs=tuple(names),
        result=draw(_packed(outputs, [leaf.index for leaf in state.leaves])),
        batch=draw(st.sampled_from([None, *numbers])),
        apart=apart,
        binds=draw(st.booleans()),
        watches_arguments=draw(st.booleans()),
        checks=draw(st.sampled_from([True, True, True, False])),
    )


def _parameters(draw: st.DrawFn, state: _Plan) -> tuple[Parameter, ...]:
    count = draw(st.integers(1, 5))
    names = draw(st.lists(st.sampled_from(NAMES), min_size=count, max_size=count, unique=True))
    drawn = draw(st.lists(st.sampled_from(["/", "", "k"]), min_size=count, max_size=count))
    kinds = sorted(drawn, key=["/", "", "k"].index)
    named = list(zip(names, kinds, strict=True))
    if draw(st.booleans()):
        named.insert(len(kinds) - kinds.count("k"), ("rest", "*"))
    if draw(st.booleans()):
        named.append(("more", "**"))
    made = []
    for name, kind in named:
        if kind == "*":
            node: Node = Items(tuple, name, (0, 1), (state.leaf("rest[0]"), state.leaf("rest[1]")))
        elif kind == "**":
            node = Items(dict, name, ("bias",), (state.leaf("more['bias']"),))
        else:
            node = state.node(name)
        given = kind == "k" and draw(st.booleans())
        default = FixedValue(draw(st.sampled_from(FIXED))) if given else None
        made.append(Parameter(name, kind, node, default))
    return tuple(made)


def _passed(state: _Plan, found: list[str]) -> list[Passed]:
    choices: list[Passed] = [FromNumber(8), FromNumber(-1), FromWeights(0), FromWeights(3)]
    choices += [FromSymbol(name) for name in found]
    choices += [FromLeaf(leaf.index) for leaf in state.leaves]
    for leaf in state.tensors:
        choices.append(FromOffset(leaf))
        sizes = state.leaves[leaf].assumption.sizes  # type: ignore[union-attr]
        choices += [FromSize(leaf, dim) for dim in range(len(sizes))]
    return choices


def _rebuild(items: list[object], context: object) -> tuple[object, object]:
    return tuple(items), context


def _packed(outputs: int, leaves: list[int]) -> st.SearchStrategy[Packed]:
    ends: list[Packed] = [FromWeights(1), *(FromConst(value) for value in FIXED)]
    ends += [FromOutput(number) for number in range(outputs)] * 6
    ends += [FromLeaf(leaf) for leaf in leaves]

    def grown(inner: st.SearchStrategy[Packed]) -> st.SearchStrategy[Packed]:
        children = st.lists(inner, min_size=0, max_size=3).map(tuple)
        return st.one_of(
            children.map(lambda c: FromItems(tuple, tuple(range(len(c))), c)),
            children.map(lambda c: FromItems(list, tuple(range(len(c))), c)),
            children.map(lambda c: FromItems(dict, ("a", (1, 2), Odd)[: len(c)], c)),
            children.map(lambda c: FromCall(_rebuild, Odd(), "Pair", c)),
        )

    return st.recursive(st.sampled_from(ends), grown, max_leaves=4)


# --- calls -------------------------------------------------------------------------------------------


def values_of(plan: EntryPlan) -> list[object]:
    """One value per parameter, as the plan has it."""
    plain = [Parameter(each.name, "", _without_watched(each.node)) for each in plan.parameters]
    return list(example_call(plain, SYMBOLS)[0])


def _without_watched(node: Node) -> Node:
    """``node`` with a value for what a plan says nothing about."""
    if isinstance(node, Leaf):
        watched = isinstance(node.assumption, WatchedObject)
        return Leaf(node.index, node.label, FixedValue(Odd())) if watched else node
    children = tuple(map(_without_watched, node.children))
    if isinstance(node, Items):
        return Items(node.kind, node.label, node.keys, children)
    return Tree(node.label, node.structure, children)  # type: ignore[arg-type]


@st.composite
def broken(draw: st.DrawFn, value: object) -> object:
    """``value`` with something in it changed, perhaps."""
    if (
        type(value) in (list, tuple, dict, collections.OrderedDict)
        and value
        and draw(st.booleans())
    ):
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))  # type: ignore[arg-type,call-overload]
        at = draw(st.sampled_from(keys))
        items = {key: value[key] for key in keys}  # type: ignore[index]
        items[at] = draw(broken(items[at]))
        return type(value)(items) if isinstance(value, dict) else type(value)(items.values())  # type: ignore[call-arg]
    if isinstance(value, torch.Tensor) and draw(st.integers(0, 9)):
        return draw(st.sampled_from(_broken_tensors(value)))
    others = [
        None,
        0,
        1,
        2,
        4,
        6,
        3,
        True,
        0.0,
        -0.0,
        math.nan,
        "mean",
        "x",
        [],
        (),
        {},
        torch.float16,
    ]
    return draw(st.sampled_from([value, *others]))


def _broken_tensors(value: torch.Tensor) -> list[object]:
    with torch.no_grad():
        changed = [value.clone(), value.detach(), torch.nn.Parameter(value.detach(), requires_grad=False) if value.is_floating_point() else value]  # fmt: skip
        changed += [value.to(torch.complex128), value.to("meta"), value.unsqueeze(0), value + 1]
        if value.dim():
            changed += [value[:1], torch.cat([value, value])]
        if value.dim() > 1:
            changed += [value.transpose(0, 1), value.transpose(0, 1).contiguous()]
        if value.is_complex():
            changed += [value.conj()]
        if value.is_floating_point():
            changed += [torch._neg_view(value), value.detach().requires_grad_()]
    return changed
