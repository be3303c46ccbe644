"""Random plans of entries, calls that keep or break them, and what a plan means, said again."""

from __future__ import annotations

import collections
import math
from dataclasses import dataclass, field

import numpy as np
import torch
from hypothesis import strategies as st

from piecework.codegen.entry import plan as assumed
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
    leaves: list[assumed.Leaf] = field(default_factory=list)
    tensors: list[int] = field(default_factory=list)
    first: list[int] = field(default_factory=list)  # tensors that are not another argument again
    known: list[str] = field(default_factory=list)

    def node(self, label: str, depth: int = 0) -> assumed.Node:
        kinds = ["leaf", "leaf", "leaf", "list", "tuple", "dict", "tree"]
        kind = self.draw(st.sampled_from(kinds if depth < 2 else kinds[:3]))
        count = self.draw(st.integers(0, 3))
        if kind == "leaf":
            return self.leaf(label)
        if kind == "tree":
            keys = [f"k{number}" for number in range(count)]
            _, structure = torch_compat.flatten_tree(collections.OrderedDict.fromkeys(keys, 1))
            leaves = (self.leaf(f"{label}['{key}']", IN_TREES) for key in keys)
            return assumed.Tree(label, structure, tuple(leaves))
        names = (0, "one", 2.5) if kind == "dict" else range(3)
        keys = tuple(names[:count])
        children = tuple(self.node(f"{label}[{key!r}]", depth + 1) for key in keys)
        return assumed.Items(
            {"list": list, "tuple": tuple, "dict": dict}[kind], label, keys, children
        )

    def leaf(self, label: str, fixed: tuple[object, ...] = FIXED) -> assumed.Leaf:
        kinds = ["tensor", "tensor", "tensor", "unused", "same", "integer", "fixed", "watched"]
        kind = self.draw(st.sampled_from(kinds))
        index = len(self.leaves)
        match kind:
            case "unused":
                assumption = assumed.UnusedTensor(self.draw(st.sampled_from(DTYPES)), CPU, 2)
            case "same" if self.first:
                other = self.draw(st.sampled_from(self.first))
                assumption = assumed.SameObject(other)
            case "integer":
                texts = [*SYMBOLS, *(["s0 * 2", "s1 // 2 + 1"] if self.complete else [])]
                assumption = assumed.IntegerInput(self.draw(st.sampled_from(texts)))
                self.known.append(assumption.symbol)
            case "fixed":
                assumption = assumed.FixedValue(self.draw(st.sampled_from(fixed)))
            case "watched":
                assumption = assumed.WatchedObject()
            case _:
                assumption = self.tensor()
        if isinstance(assumption, (assumed.TensorInput, assumed.UnusedTensor)):
            self.first.append(index)
            self.tensors += [index] if isinstance(assumption, assumed.TensorInput) else []
        self.leaves.append(assumed.Leaf(index, label, assumption))
        return self.leaves[-1]

    @property
    def complete(self) -> bool:
        return set(SYMBOLS) <= set(self.known)

    def tensor(self) -> assumed.TensorInput:
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
        return assumed.TensorInput(
            dtype, CPU, sizes, strides, kind if floats else torch.Tensor, grad, item
        )


@st.composite
def plans(draw: st.DrawFn) -> assumed.EntryPlan:
    """A plan whose symbols are all found, or are not mentioned."""
    state = _Plan(draw)
    parameters = _parameters(draw, state)
    found = [name for name in SYMBOLS if name in state.known]
    guards = [text for text in GUARDS if all(n in found or n not in text for n in SYMBOLS)]
    chosen = draw(st.lists(st.sampled_from(guards), unique=True)) if guards else []
    bound = st.sampled_from([(None, None), (2, None), (None, 64), (0, 64)])
    symbols = tuple(assumed.Symbol(name, *draw(bound)) for name in found)
    passed = draw(st.lists(st.sampled_from(_passed(state, found)), max_size=4))
    outputs = draw(st.integers(0, 3))
    names = draw(st.lists(st.sampled_from(NAMES), min_size=outputs, max_size=outputs))
    numbers = [assumed.FromSymbol(name) for name in found]
    apart = ()
    if len(state.first) > 1 and draw(st.booleans()):
        apart = ((state.first[0], tuple(state.first[1:])),)
    leaves = [leaf.index for leaf in state.leaves]
    return assumed.EntryPlan(
        *(("model: random",), parameters, symbols, tuple(chosen), tuple(passed), tuple(names)),
        result=draw(_packed(outputs, leaves)),
        batch=draw(st.sampled_from([None, *numbers])),
        apart=apart,
        checks=draw(st.sampled_from([True, True, True, False])),
        binds=draw(st.booleans()),
        watches_arguments=draw(st.booleans()),
    )


def _parameters(draw: st.DrawFn, state: _Plan) -> tuple[assumed.Parameter, ...]:
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
            rest = state.leaf("rest[0]"), state.leaf("rest[1]")
            node: assumed.Node = assumed.Items(tuple, name, (0, 1), rest)
        elif kind == "**":
            node = assumed.Items(dict, name, ("bias",), (state.leaf("more['bias']"),))
        else:
            node = state.node(name)
        given = kind == "k" and draw(st.booleans())
        default = assumed.FixedValue(draw(st.sampled_from(FIXED))) if given else None
        made.append(assumed.Parameter(name, kind, node, default))
    return tuple(made)


def _passed(state: _Plan, found: list[str]) -> list[assumed.Passed]:
    choices: list[assumed.Passed] = [assumed.FromConst(value) for value in (8, -1)]
    choices += [assumed.FromWeights(index) for index in (0, 3)]
    choices += [assumed.FromSymbol(name) for name in found]
    choices += [assumed.FromLeaf(leaf.index) for leaf in state.leaves]
    for leaf in state.tensors:
        choices.append(assumed.FromLeaf(leaf, ".storage_offset()"))
        sizes = state.leaves[leaf].assumption.sizes  # type: ignore[union-attr]
        choices += [assumed.FromLeaf(leaf, f".size({dim})") for dim in range(len(sizes))]
    return choices


def _rebuild(items: list[object], context: object) -> tuple[object, object]:
    return tuple(items), context


def _packed(outputs: int, leaves: list[int]) -> st.SearchStrategy[assumed.Packed]:
    ends: list[assumed.Packed] = [assumed.FromWeights(1), *map(assumed.FromConst, FIXED)]
    ends += [assumed.FromOutput(number) for number in range(outputs)] * 6
    ends += [assumed.FromLeaf(leaf) for leaf in leaves]

    def grown(inner: st.SearchStrategy[assumed.Packed]) -> st.SearchStrategy[assumed.Packed]:
        children = st.lists(inner, min_size=0, max_size=3).map(tuple)
        return st.one_of(
            children.map(lambda c: assumed.FromItems(tuple, tuple(range(len(c))), c)),
            children.map(lambda c: assumed.FromItems(list, tuple(range(len(c))), c)),
            children.map(lambda c: assumed.FromItems(dict, ("a", (1, 2), Odd)[: len(c)], c)),
            children.map(lambda c: assumed.FromCall(_rebuild, Odd(), "Pair", c)),
        )

    return st.recursive(st.sampled_from(ends), grown, max_leaves=4)


def values_of(plan: assumed.EntryPlan) -> list[object]:
    """One value per parameter, as the plan has it."""
    nodes = ((each.name, _without_watched(each.node)) for each in plan.parameters)
    return list(example_call([assumed.Parameter(n, "", node) for n, node in nodes], SYMBOLS)[0])


def _without_watched(node: assumed.Node) -> assumed.Node:
    """``node`` with a value for what a plan says nothing about."""
    if isinstance(node, assumed.Leaf):
        watched = isinstance(node.assumption, assumed.WatchedObject)
        return assumed.Leaf(node.index, node.label, assumed.FixedValue(Odd())) if watched else node
    children = tuple(map(_without_watched, node.children))
    if isinstance(node, assumed.Items):
        return assumed.Items(node.kind, node.label, node.keys, children)
    return assumed.Tree(node.label, node.structure, children)  # type: ignore[arg-type]


@st.composite
def broken(draw: st.DrawFn, value: object) -> object:
    """``value`` with something in it changed, perhaps."""
    several = type(value) in (list, tuple, dict, collections.OrderedDict)
    if several and value and draw(st.booleans()):
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))  # type: ignore[arg-type,call-overload]
        at = draw(st.sampled_from(keys))
        items = {key: value[key] for key in keys}  # type: ignore[index]
        items[at] = draw(broken(items[at]))
        return type(value)(items) if isinstance(value, dict) else type(value)(items.values())  # type: ignore[call-arg]
    if isinstance(value, torch.Tensor) and draw(st.integers(0, 9)):
        return draw(st.sampled_from(_broken_tensors(value)))
    others = [None, *(0, 1, 2, 4, 6, 3, True, 0.0, -0.0, math.nan), "mean", "x", [], (), {}]
    return draw(st.sampled_from([value, *others, torch.float16]))


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


class Meaning:
    """What a plan says of a call, read off the plan itself; ``holds``: whether it is what it assumes."""

    def __init__(self, plan: assumed.EntryPlan, values: list[object]) -> None:
        self.leaves: dict[int, object] = {}  # by the number of a flattened argument
        self.symbols: dict[str, object] = {}
        self._leaves: list[assumed.Leaf] = []
        self._names = {each.name for each in plan.symbols}
        parameters = zip(plan.parameters, values, strict=True)
        self.holds = all([self._node(each.node, value) for each, value in parameters])
        self.holds = self.holds and all(map(self._told, self._leaves))
        self.holds = self.holds and all(map(self._leaf, self._leaves)) and self._whole(plan)

    def _node(self, node: assumed.Node, value: object) -> bool:
        if isinstance(node, assumed.Leaf):
            self.leaves[node.index] = value
            self._leaves.append(node)
            return True
        if isinstance(node, assumed.Tree):
            parts, structure = torch_compat.flatten_tree(value)
            pairs = zip(node.children, parts, strict=False)
            return structure == node.structure and all([self._node(*pair) for pair in pairs])
        if type(value) is not node.kind or len(value) != len(node.keys):  # type: ignore[arg-type]
            return False
        if isinstance(value, dict) and not set(node.keys) <= value.keys():
            return False
        pairs = zip(node.children, (value[key] for key in node.keys), strict=True)  # type: ignore[index]
        return all([self._node(*pair) for pair in pairs])

    def _numbers(self, leaf: assumed.Leaf) -> list[tuple[object, object]]:
        """Numbers of an argument, each with what the plan says that it is."""
        value, said = self.leaves[leaf.index], leaf.assumption
        if isinstance(said, assumed.IntegerInput):
            return [(said.symbol, value)] if type(value) is int else [("0", 1)]
        if not isinstance(said, assumed.TensorInput):
            return []
        if not isinstance(value, torch.Tensor) or value.dim() != len(said.sizes):
            return [("0", 1)]
        if value.device.type != said.device.type or value.layout is not torch.strided:
            return [("0", 1)]
        found = [*zip(said.sizes, value.shape, strict=True)]
        found += zip(said.strides or (), value.stride(), strict=False)
        return [*found, *([] if said.item is None else [(said.item, value.item())])]

    def _told(self, leaf: assumed.Leaf) -> bool:
        """Take symbols where a number is just that; two that differ are told apart later."""
        for text, number in self._numbers(leaf):
            if text in self._names:
                self.symbols.setdefault(str(text), number)
        return True

    def _is(self, text: str) -> bool:
        try:
            return bool(eval(text, {"math": math}, dict(self.symbols)))
        except ArithmeticError:
            return False

    def _leaf(self, leaf: assumed.Leaf) -> bool:
        value = self.leaves[leaf.index]
        match leaf.assumption:
            case assumed.SameObject(index):
                return value is self.leaves[index]
            case assumed.FixedValue(fixed):
                zero = type(fixed) is float and not abs(fixed) > 0  # or no number at all
                equal = (lambda: repr(value) == repr(fixed)) if zero else (lambda: value == fixed)
                return value is fixed or (type(value) is type(fixed) and bool(equal()))
            case assumed.UnusedTensor(dtype, device, rank):
                kinds: tuple[type, ...] = (torch.Tensor, torch.nn.Parameter)
            case assumed.TensorInput(dtype, device, sizes, strides, kind, grad):
                kinds, rank = (kind,), len(sizes)
                if type(value) is not kind or (strides is None and not value.is_contiguous()):
                    return False
                if value.is_neg() or value.is_conj() or grad not in (None, value.requires_grad):
                    return False
            case _:
                kinds = ()
        if kinds:
            about = (value.dtype, value.device.type, value.dim()) if type(value) in kinds else None
            if about != (dtype, device.type, rank) or value.layout is not torch.strided:
                return False
        return all(self._is(f"{number} == ({text})") for text, number in self._numbers(leaf))

    def _whole(self, plan: assumed.EntryPlan) -> bool:
        for each in plan.symbols:
            number = self.symbols[each.name]
            if not (each.low or 0) <= number <= (each.high or math.inf):  # type: ignore[operator]
                return False
        kinds = (assumed.TensorInput, assumed.UnusedTensor)
        tensors = [self.leaves[x.index] for x in self._leaves if isinstance(x.assumption, kinds)]
        storages = {x.untyped_storage()._cdata for x in tensors}  # type: ignore[attr-defined]
        several = len(storages) == len(tensors) or not plan.apart
        return (
            all(map(self._is, plan.guards)) and len({*map(id, tensors)}) == len(tensors) and several
        )

    def passed(self, value: assumed.Passed, weights: list[object]) -> object:
        """What a call hands on for ``value``."""
        match value:
            case assumed.FromLeaf(leaf, read):
                return eval(f"leaf{read}", {"leaf": self.leaves[leaf]})
            case assumed.FromSymbol(name):
                return self.symbols[name]
            case assumed.FromConst(const):
                return const
        return weights[value.index]

    def packed(self, value: assumed.Packed, outputs: list[object], weights: list[object]) -> object:
        """What a call returns for ``value``."""
        match value:
            case assumed.FromOutput(index):
                return outputs[index]
            case assumed.FromItems(kind, keys, children):
                items = [self.packed(each, outputs, weights) for each in children]
                return dict(zip(keys, items, strict=True)) if kind is dict else kind(items)
            case assumed.FromCall(rebuild, context, _, children):
                items = [self.packed(each, outputs, weights) for each in children]
                return rebuild(items, context)  # type: ignore[operator]
        return self.passed(value, weights)  # type: ignore[arg-type]
