"""What an entry checks of a call, as one table: each assumption with the Python that tests it, in the order in which a call meets them.

The emitted ``check_inputs`` is the table as text; the explanation of a refused call runs it one check at a time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import EllipsisType, NoneType
from typing import assert_never

import torch

from piecework.codegen.entry.plan import (
    EntryPlan,
    FixedValue,
    IntegerInput,
    Items,
    Leaf,
    Node,
    SameObject,
    Size,
    TensorInput,
    Tree,
    UnusedTensor,
    WatchedObject,
)
from piecework.codegen.plan.literals import is_inline_literal, literal_text
from piecework.codegen.plan.names import NameTable
from piecework.codegen.plan.one_line import targets_text, tuple_text


@dataclass(frozen=True, slots=True)
class Check:
    """One assumption.

    Attributes:
        kind: which; errors are told by it.
        text: the condition.
        leaf: the flattened argument that it is about; None for several, or a container.
        name: what the text calls what is looked at.
        label: what errors call it.
        expected: what the trace had there.
        dim: the dimension, for a size or a stride.
    """

    kind: str
    text: str
    leaf: int | None = None
    name: str = ""
    label: str = ""
    expected: object = None
    dim: int | None = None


@dataclass(frozen=True, slots=True)
class Bind:
    """A statement that gives names to values of the call; ``leaf`` is the argument that it is about."""

    text: str
    leaf: int | None = None


@dataclass(frozen=True, slots=True)
class Require:
    """Checks that are made together; ``about`` says of what, for readers."""

    about: str
    checks: tuple[Check, ...]

    @property
    def leaf(self) -> int | None:
        return self.checks[0].leaf


class Names(NameTable):
    """Gives out the names of one entry, and holds what its text mentions that has no literal."""

    def __init__(self, reserved: frozenset[str]) -> None:
        super().__init__(reserved, frozenset())
        self.consts: dict[str, object] = {}

    def value(self, value: object, wish: str = "value") -> str:
        if is_inline_literal(value):
            return literal_text(value)
        known = (name for name, each in self.consts.items() if each is value)
        name = next(known, None) or self.claim(wish)
        self.consts[name] = value
        return name


class EntryTable:
    """The steps of ``check_inputs``.

    Args:
        plan: what is assumed.
        names: gives out names.
        parameters: what the parameters are called.

    Attributes:
        steps: bindings and checks, each value bound and looked at before what is in it.
        leaves: flattened argument → what it is called.
        symbols: symbol → what it is called.
        origin: symbol → the label of the argument that tells it, and where in it: its number and a dimension.
        unpacked: names that are no parameters.
    """

    def __init__(self, plan: EntryPlan, names: Names, parameters: Sequence[str]) -> None:
        self.plan, self.names, self.parameters = plan, names, tuple(parameters)
        self.leaves: dict[int, str] = {}
        self.symbols: dict[str, str] = {}
        self.origin: dict[str, tuple[str, tuple[int, int | None]]] = {}
        self.unpacked: list[str] = []
        self._sized = {symbol.name for symbol in plan.symbols}
        self._labels: dict[int, str] = {}
        self._tensors: list[int] = []
        self._same: list[Require] = []
        self._late: list[Callable[[], Check]] = []  # over symbols that are all known in the end
        self.steps = tuple(self._steps())

    def _steps(self) -> Iterator[Bind | Require]:
        plan, leaves, labels = self.plan, self.leaves, self._labels
        for parameter, name in zip(plan.parameters, self.parameters, strict=True):
            yield from self._node(parameter.node, name)
        bounds = [
            Check("range", range_text(self.symbols[each.name], each.low, each.high), expected=each)
            for each in plan.symbols
            if each.name in self.symbols and (each.low, each.high) != (None, None)
        ]
        yield from _require("sizes that the trace allows", bounds)
        late = [make() for make in self._late]
        late += [Check("relation", self._relation(text), expected=text) for text in plan.guards]
        yield from _require("relations that the trace relied on", late)
        yield from self._same
        several = [leaves[each] for each in self._tensors]
        if len(several) == 2:
            check = Check("distinct", " is not ".join(several), expected=tuple(self._tensors))
            yield Require("two tensors", (check,))
        elif several[1:]:
            text = f"len({{{', '.join(f'id({each})' for each in several)}}}) == {len(several)}"
            check = Check("distinct", text, expected=tuple(self._tensors))
            yield Require(f"{len(several)} tensors", (check,))
        for written, others in plan.apart:
            about = f"{labels[written]}: written, so no other argument may share its memory"
            text = f"memory_apart({', '.join(leaves[each] for each in (written, *others))})"
            check = Check("apart", text, written, leaves[written], labels[written], others)
            yield Require(about, (check,))
        if plan.watches_arguments:
            text = f"arguments_as_traced({', '.join(self.parameters)})"
            yield Require("what else the trace read of the arguments", (Check("traced", text),))

    def label(self, leaf: int) -> str:
        return self._labels[leaf]

    def _node(self, node: Node, place: str) -> Iterator[Bind | Require]:
        value = self.names.value
        match node:
            case Leaf():
                yield from self._leaf(node, place)
            case Items(kind, label, keys, children):
                inside = [f"{value(key)} in {place}" for key in keys if kind is dict]
                text = " and ".join([f"len({place}) == {len(keys)}", *inside])
                of_kind = f"type({place}) is {kind.__name__}"
                checks = (
                    Check("kind", of_kind, None, place, label, kind),
                    Check("keys", text, None, place, label, keys),
                )
                yield Require(f"{label}: a {kind.__name__} of {len(keys)}", checks)
                for key, child in zip(keys, children, strict=True):
                    yield from self._node(child, f"{place}[{value(key)}]")
            case Tree(label, structure, children):
                leaves, spec = self.names.claim("leaves"), self.names.claim("structure")
                yield Bind(f"{leaves}, {spec} = flatten({place})")
                expected = value(structure, "expected_structure")
                check = Check("structure", f"{spec} == {expected}", None, place, label)
                yield Require(f"{label}: of the traced structure", (check,))
                for number, child in enumerate(children):
                    yield from self._leaf(child, f"{leaves}[{number}]")
            case _:
                assert_never(node)

    def _leaf(self, leaf: Leaf, place: str) -> Iterator[Bind | Require]:
        index, label = leaf.index, leaf.label
        self._labels[index] = label
        self.leaves[index] = name = place
        if place not in self.parameters:
            self.leaves[index] = name = self._unpack(label)
            yield Bind(f"{name} = {place}", index)
        match leaf.assumption:
            case TensorInput():
                yield from self._tensor(index, name, label, leaf.assumption)
            case UnusedTensor(dtype, device, rank):
                self._tensors.append(index)
                plain = f"type({name}) is torch.Tensor or type({name}) is torch.nn.Parameter"
                checks = (
                    Check("class", plain, index, name, label),
                    *_memory(index, name, label, dtype, device, rank),
                )
                yield Require(f"{label}: not read by the model", checks)
            case SameObject(other, first):
                check = Check("same", f"{name} is {self.leaves[other]}", index, name, label, first)
                self._same.append(Require(f"{label}: the same tensor as {first}", (check,)))
            case IntegerInput(symbol):
                check = Check("int", f"type({name}) is int", index, name, label)
                yield Require(f"{label}: an integer", (check,))
                if not self._is_told(symbol, name, index, None):
                    self._compare_late("integer", index, name, symbol)
            case FixedValue(value):
                text = self._is_value(name, value, label)
                check = Check("value", text, index, name, label, value)
                yield Require(f"{label}: fixed by the trace", (check,))
            case WatchedObject():
                pass
            case _:
                assert_never(leaf.assumption)

    def _is_value(self, name: str, value: object, label: str) -> str:
        """A Python value, by type and equality; the very object is good enough, and needed of a tensor or an array."""
        known = self.names.value(value, f"traced_{label}")
        if is_object(value) or isinstance(value, (bool, NoneType, EllipsisType)):
            return f"{name} is {known}"
        if type(value) is float and not abs(value) > 0:
            # Two NaNs are unequal and the two zeros equal, where the model's code may tell zeros apart.
            return f"type({name}) is float and repr({name}) == {self.names.value(repr(value))}"
        if is_inline_literal(value):
            return f"type({name}) is {type(value).__name__} and {name} == {known}"
        return f"({name} is {known} or (type({name}) is type({known}) and {name} == {known}))"

    def _tensor(
        self, index: int, name: str, label: str, tensor: TensorInput
    ) -> Iterator[Bind | Require]:
        self._tensors.append(index)
        checks = [*_tensor_checks(index, name, label, tensor)]
        layout = "contiguous" if tensor.strides is None else "strided as traced"
        short = f"{str(tensor.dtype).removeprefix('torch.')}[{', '.join(map(str, tensor.sizes))}]"
        about = f"{label}: {short} on {tensor.device}, {layout}"
        if tensor.sizes and all(isinstance(size, int) for size in tensor.sizes):
            text = f"{name}.shape == {tuple_text([*map(str, tensor.sizes)])}"
            yield Require(about, (*checks, Check("shape", text, index, name, label, tensor.sizes)))
        else:
            yield Require(about, tuple(checks))
            yield from self._sizes(index, name, label, tensor.sizes)
        yield from self._item(index, name, label, tensor.item)
        for dim, stride in enumerate(tensor.strides or ()):
            self._compare_late("stride", index, f"{name}.stride({dim})", stride, dim)

    def _sizes(
        self, index: int, name: str, label: str, sizes: Sequence[Size]
    ) -> Iterator[Bind | Require]:
        """A symbol that is met for the first time is taken from the shape; all else is compared, at once or in the end."""
        taken: list[str] = []
        now: list[Check] = []
        for dim, size in enumerate(sizes):
            if isinstance(size, str) and size in self._sized and size not in self.symbols:
                taken.append(self._unpack(size))
                self.symbols[size], self.origin[size] = taken[-1], (label, (index, dim))
                continue
            taken.append(self.names.claim(f"{label}_{dim}"))
            if isinstance(size, int) or size in self.symbols:
                now.append(self._compared("size", index, taken[-1], size, dim))
            else:
                self._compare_late("size", index, taken[-1], size, dim)
        if taken:
            yield Bind(f"{targets_text(tuple(taken), True)}{name}.shape", index)
        yield from _require("", now)

    def _item(
        self, index: int, name: str, label: str, item: float | str | None
    ) -> Iterator[Bind | Require]:
        """The value of a single number, where the trace looked at it."""
        if item is None:
            return
        if not isinstance(item, str):
            check = self._compared("item", index, f"{name}.item()", item)
            yield Require(f"{label}: its value", (check,))
        elif item.isidentifier() and item not in self.symbols:
            self._is_told(item, self._unpack(item), index, None)
            yield Bind(f"{self.symbols[item]} = {name}.item()", index)
        else:
            self._compare_late("item", index, f"{name}.item()", item)

    def _is_told(self, symbol: str, name: str, leaf: int, dim: int | None) -> bool:
        """Take ``name`` for ``symbol``, if it is one and not known yet."""
        if not symbol.isidentifier() or symbol in self.symbols:
            return False
        self.symbols[symbol], self.origin[symbol] = name, (self._labels[leaf], (leaf, dim))
        return True

    def _unpack(self, wish: str) -> str:
        self.unpacked.append(self.names.claim(wish))
        return self.unpacked[-1]

    # --- numbers ---------------------------------------------------------------------------------

    def _compare_late(
        self, kind: str, leaf: int, name: str, size: Size | float, dim: int | None = None
    ) -> None:
        self._late.append(lambda: self._compared(kind, leaf, name, size, dim))

    def _compared(
        self, kind: str, leaf: int, name: str, size: Size | float, dim: int | None = None
    ) -> Check:
        """What ``name`` says is ``size``: a number, a symbol that is known, or an expression over those."""
        text = f"{name} == {self.names.value(size)}"
        if isinstance(size, str):
            text = self._relation(f"{_VALUE} == {size}").replace(_VALUE, name)
        return Check(kind, text, leaf, name, self._labels[leaf], size, dim)

    def _relation(self, text: str) -> str:
        """A relation over symbols, by what the text calls them."""
        names = r"(?<![\w.])[A-Za-z_]\w*"
        return re.sub(names, lambda each: self.symbols.get(each.group(), each.group()), text)


_VALUE = "__value__"  # no symbol's name


def range_text(name: str, low: int | None, high: int | None) -> str:
    """That a number is within its smallest and largest value; None where there is no bound."""
    if low is None:
        return f"{name} <= {high}"
    return f"{name} >= {low}" if high is None else f"{low} <= {name} <= {high}"


def is_object(value: object) -> bool:
    """Whether a fixed value must be this object: equality of tensors and arrays is no yes or no."""
    return isinstance(value, torch.Tensor) or bool(getattr(value, "shape", ()))


def _require(about: str, checks: Sequence[Check]) -> Iterator[Require]:
    if checks:
        yield Require(about, tuple(checks))


def _memory(
    leaf: int, name: str, label: str, dtype: torch.dtype, device: torch.device, rank: int
) -> tuple[Check, ...]:
    where = f"{name}.device == torch.device({literal_text(str(device))})"
    if device.type == "cpu":
        where = f"{name}.is_cpu"
    elif device.type == "cuda":
        where = f"{name}.is_cuda and {name}.get_device() == {device.index or 0}"
    return (
        Check("dtype", f"{name}.dtype is {dtype}", leaf, name, label, dtype),
        Check("layout", f"{name}.layout is torch.strided", leaf, name, label, torch.strided),
        Check("device", where, leaf, name, label, device),
        Check("rank", f"{name}.dim() == {rank}", leaf, name, label, rank),
    )


def _tensor_checks(leaf: int, name: str, label: str, tensor: TensorInput) -> Iterator[Check]:
    """What doesn't need a size. Integers are never negated or conjugated lazily, and never require gradients."""
    about = (leaf, name, label)
    kind = "Tensor" if tensor.kind is torch.Tensor else "nn.Parameter"
    yield Check("class", f"type({name}) is torch.{kind}", *about, tensor.kind)
    yield from _memory(*about, tensor.dtype, tensor.device, len(tensor.sizes))
    if tensor.strides is None:
        yield Check("contiguous", f"{name}.is_contiguous()", *about)
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        yield Check("lazy", f"not {name}.is_neg()", *about)
        if tensor.requires_grad is not None:
            text = f"{'' if tensor.requires_grad else 'not '}{name}.requires_grad"
            yield Check("grad", text, *about, tensor.requires_grad)
    if tensor.dtype.is_complex:
        yield Check("lazy", f"not {name}.is_conj()", *about)
