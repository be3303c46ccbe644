"""What an entry checks of a call, as one table: each assumption with the Python that tests it.

The emitted ``check_inputs`` is the table as text; a refused call is explained check by check.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from types import EllipsisType, NoneType
from typing import Any, assert_never

import torch

from piecework.codegen.entry import plan as entry
from piecework.codegen.plan.literals import (
    is_inline_literal,
    literal_text,
    targets_text,
    tuple_text,
)
from piecework.codegen.plan.names import NameTable


@dataclass(frozen=True, slots=True)
class Check:
    """One assumption."""

    kind: str  # which; errors are told by it
    text: str  # the condition
    leaf: int  # the flattened argument that it is about; -1 for several, or a container
    label: str  # what errors call it
    read: str = ""  # the text of what is compared; "" where the condition alone says it
    expected: object = None  # what the trace had there
    dim: int | None = None  # the dimension, for a size or a stride


@dataclass(frozen=True, slots=True)
class Require:
    """Checks that are made together; ``about`` says of what, for readers."""

    about: str
    checks: tuple[Check, ...]


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
    """The steps of ``check_inputs``."""

    def __init__(self, plan: entry.EntryPlan, names: Names, parameters: Sequence[str]) -> None:
        self.plan, self.names, self.parameters = plan, names, tuple(parameters)
        # Statements that name values of the call; each is looked at before what is in it.
        self.steps: list[str | Require] = []
        self.leaves: dict[int, str] = {}  # flattened argument -> what it is called
        self.symbols: dict[str, str] = {}  # symbol -> what it is called
        # symbol -> the argument that tells it, and the dimension of it
        self.origin: dict[str, tuple[_About, int | None]] = {}
        self.unpacked: list[str] = []  # names that are no parameters
        self._sized = {symbol.name for symbol in plan.symbols}
        self._labels: dict[int, str] = {}
        self._tensors: list[int] = []
        self._about: _About = _SEVERAL
        self._checks: list[Check] = []  # of the step that is being made
        # What is compared in the end, over symbols that are all known then.
        self._late: list[tuple[_About, str, str, entry.Size | float, int | None]] = []
        self._same: list[Require] = []
        for parameter, name in zip(plan.parameters, self.parameters, strict=True):
            self._node(parameter.node, name)
        for symbol in plan.symbols:
            if symbol.name in self.symbols and (symbol.low, symbol.high) != (None, None):
                name = self.symbols[symbol.name]
                text = range_text(name, symbol.low, symbol.high)
                self._about, dim = self.origin[symbol.name]
                self._check("range", text, name, text, dim)
        self._require("sizes that the trace allows")
        for about, kind, read, size, dim in self._late:
            self._about = about
            self._compare(kind, read, size, dim)
        self._about = _SEVERAL
        for text in plan.guards:
            self._check("relation", self._relation(text), "", text)
        self._require("relations that the trace relied on")
        self.steps += self._same
        self._apart()
        if plan.watches_arguments:
            self._check("traced", f"arguments_as_traced({', '.join(self.parameters)})")
            self._require("what else the trace read of the arguments")

    def _check(self, kind: str, text: str, read: str = "", *expected: Any) -> None:
        """``expected``: what the trace had there, and in which dimension."""
        self._checks.append(Check(kind, text, *self._about, read, *expected))

    def _is(self, kind: str, read: str, expected: object, text: str) -> None:
        """``read`` gives the very object ``expected``, which is called ``text``."""
        self._check(kind, f"{read} is {text}", read, expected)

    def _require(self, about: str) -> None:
        if self._checks:
            self.steps.append(Require(about, tuple(self._checks)))
        self._checks = []

    def _unpack(self, wish: str) -> str:
        self.unpacked.append(self.names.claim(wish))
        return self.unpacked[-1]

    # --- arguments -------------------------------------------------------------------------------

    def _node(self, node: entry.Node, place: str) -> None:
        value = self.names.value
        match node:
            case entry.Leaf():
                self._leaf(node, place)
            case entry.Items(kind, label, keys, children):
                self._about = (-1, label)
                inside = [f"{value(key)} in {place}" for key in keys if kind is dict]
                self._is("type", f"type({place})", kind, kind.__name__)
                found = f"tuple({place if kind is dict else f'range(len({place}))'})"
                text = " and ".join([f"len({place}) == {len(keys)}", *inside])
                self._check("keys", text, found, keys)
                self._require(f"{label}: a {kind.__name__} of {len(keys)}")
                for key, child in zip(keys, children, strict=True):
                    self._node(child, f"{place}[{value(key)}]")
            case entry.Tree(label, structure, children):
                leaves, spec = self.names.claim("leaves"), self.names.claim("structure")
                self.steps.append(f"{leaves}, {spec} = flatten({place})")
                self._about = (-1, label)
                self._check("structure", f"{spec} == {value(structure, 'expected_structure')}")
                self._require(f"{label}: of the traced structure")
                for number, child in enumerate(children):
                    self._leaf(child, f"{leaves}[{number}]")
            case _:
                assert_never(node)

    def _leaf(self, leaf: entry.Leaf, place: str) -> None:
        index, label, name = leaf.index, leaf.label, place
        if place not in self.parameters:
            name = self._unpack(label)
            self.steps.append(f"{name} = {place}")
        self.leaves[index], self._labels[index] = name, label
        self._about = (index, label)
        match leaf.assumption:
            case entry.TensorInput():
                self._tensor(index, name, label, leaf.assumption)
            case entry.UnusedTensor(dtype, device, rank):
                self._tensors.append(index)
                kind = f"type({name})"
                plain = f"{kind} is torch.Tensor or {kind} is torch.nn.Parameter"
                self._check("class", plain, kind, torch.Tensor)
                self._memory(name, dtype, device, rank)
                self._require(f"{label}: not read by the model")
            case entry.SameObject(other):
                self._check("same", f"{name} is {self.leaves[other]}")
                about = f"{label}: the same tensor as {self._labels[other]}"
                self._same.append(Require(about, (self._checks.pop(),)))
            case entry.IntegerInput(symbol):
                self._is("type", f"type({name})", int, "int")
                self._require(f"{label}: an integer")
                self._take("integer", symbol, name)
            case entry.FixedValue(value):
                self._check("value", self._is_value(name, value, label), name, value)
                self._require(f"{label}: fixed by the trace")
            case entry.WatchedObject():
                pass
            case _:
                assert_never(leaf.assumption)

    def _is_value(self, name: str, value: object, label: str) -> str:
        """A Python value, by type and equality."""
        known = self.names.value(value, f"traced_{label}")
        if is_object(value) or isinstance(value, (bool, NoneType, EllipsisType)):
            return f"{name} is {known}"
        if type(value) is float and not abs(value) > 0:
            # Two NaNs are unequal and the two zeros equal, where the model's code may tell zeros apart.
            return f"type({name}) is float and repr({name}) == {self.names.value(repr(value))}"
        if is_inline_literal(value):
            return f"type({name}) is {type(value).__name__} and {name} == {known}"
        return f"({name} is {known} or (type({name}) is type({known}) and {name} == {known}))"

    def _tensor(self, index: int, name: str, label: str, tensor: entry.TensorInput) -> None:
        self._tensors.append(index)
        kind = "Tensor" if tensor.kind is torch.Tensor else "nn.Parameter"
        self._is("class", f"type({name})", tensor.kind, f"torch.{kind}")
        self._memory(name, tensor.dtype, tensor.device, len(tensor.sizes))
        if tensor.strides is None:
            self._check("contiguous", f"{name}.is_contiguous()")
        # Integers are never negated or conjugated lazily, and never require gradients.
        if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
            self._check("lazy", f"not {name}.is_neg()")
            if tensor.requires_grad is not None:
                read = f"{name}.requires_grad"
                text = f"{'' if tensor.requires_grad else 'not '}{read}"
                self._check("requires_grad", text, read, tensor.requires_grad)
        if tensor.dtype.is_complex:
            self._check("lazy", f"not {name}.is_conj()")
        fixed = bool(tensor.sizes) and all(isinstance(size, int) for size in tensor.sizes)
        if fixed:
            text = f"{name}.shape == {tuple_text([*map(str, tensor.sizes)])}"
            self._check("shape", text, f"{name}.shape", tensor.sizes)
        layout = "contiguous" if tensor.strides is None else "strided as traced"
        short = f"{str(tensor.dtype).removeprefix('torch.')}[{', '.join(map(str, tensor.sizes))}]"
        self._require(f"{label}: {short} on {tensor.device}, {layout}")
        if tensor.sizes and not fixed:
            self._sizes(name, label, tensor.sizes)
        read, item = f"{name}.item()", tensor.item
        if isinstance(item, str) and item.isidentifier() and item not in self.symbols:
            self._take("item", item, self._unpack(item))
            self.steps.append(f"{self.symbols[item]} = {read}")
        elif isinstance(item, str):
            self._late.append((self._about, "item", read, item, None))
        elif item is not None:
            self._compare("item", read, item)
            self._require(f"{label}: its value")
        for dim, stride in enumerate(tensor.strides or ()):
            self._late.append((self._about, "stride", f"{name}.stride({dim})", stride, dim))

    def _memory(self, name: str, dtype: torch.dtype, device: torch.device, rank: int) -> None:
        where = f"{name}.device == torch.device({literal_text(str(device))})"
        if device.type == "cpu":
            where = f"{name}.is_cpu"
        elif device.type == "cuda":
            where = f"{name}.is_cuda and {name}.get_device() == {device.index or 0}"
        self._is("dtype", f"{name}.dtype", dtype, str(dtype))
        self._is("layout", f"{name}.layout", torch.strided, "torch.strided")
        self._check("device", where, f"{name}.device", device)
        self._check("rank", f"{name}.dim() == {rank}", f"{name}.dim()", rank)

    def _sizes(self, name: str, label: str, sizes: Sequence[entry.Size]) -> None:
        """A symbol that is met for the first time is taken from the shape."""
        taken: list[str] = []
        for dim, size in enumerate(sizes):
            if isinstance(size, str) and size in self._sized and size not in self.symbols:
                taken.append(self._unpack(size))
                self.symbols[size], self.origin[size] = taken[-1], (self._about, dim)
                continue
            taken.append(self.names.claim(f"{label}_{dim}"))
            if isinstance(size, int) or size in self.symbols:
                self._compare("size", taken[-1], size, dim)
            else:
                self._late.append((self._about, "size", taken[-1], size, dim))
        self.steps.append(f"{targets_text(taken, True)}{name}.shape")
        self._require("")

    def _apart(self) -> None:
        """Tensors that are several objects, and what a piece writes in memory of its own."""
        several = [self.leaves[each] for each in self._tensors]
        if len(several) == 2:
            self._check("distinct", " is not ".join(several))
            self._require("two tensors")
        elif several[1:]:
            text = f"len({{{', '.join(f'id({each})' for each in several)}}}) == {len(several)}"
            self._check("distinct", text)
            self._require(f"{len(several)} tensors")
        for written, others in self.plan.apart:
            every = [self.leaves[each] for each in (written, *others)]
            self._check("apart", f"memory_apart({', '.join(every)})")
            about = "written, so no other argument may share its memory"
            self._require(f"{self._labels[written]}: {about}")
        for number, each in enumerate(self.plan.not_held):
            name, label = self.leaves[each.leaf], self._labels[each.leaf]
            self._about = (each.leaf, label)
            for weight in each.others:
                text = f"{name} is not held_tensors[{weight}]"
                self._check("held", text, name, self.plan.held[weight])
            if each.apart:
                self._check("shared", f"memory_outside({name}, held_spans[{number}])", name, each)
            self._require(f"{label}: apart from what the model holds")
        self._about = _SEVERAL

    # --- numbers ---------------------------------------------------------------------------------

    def _take(self, kind: str, symbol: str, name: str) -> None:
        """Take ``name`` for ``symbol``, if it is one and not known yet."""
        if symbol.isidentifier() and symbol not in self.symbols:
            self.symbols[symbol], self.origin[symbol] = name, (self._about, None)
        else:
            self._late.append((self._about, kind, name, symbol, None))

    def _compare(
        self, kind: str, read: str, size: entry.Size | float, dim: int | None = None
    ) -> None:
        """``read`` gives ``size``: a number, or an expression over known symbols."""
        text = f"{read} == {self.names.value(size)}"
        if isinstance(size, str):
            text = self._relation(f"{_VALUE} == {size}").replace(_VALUE, read)
        self._check(kind, text, read, size, dim)

    def _relation(self, text: str) -> str:
        """A relation over symbols, by what the text calls them."""
        names = r"(?<![\w.])[A-Za-z_]\w*"
        return re.sub(names, lambda each: self.symbols.get(each.group(), each.group()), text)


_About = tuple[int, str]  # a flattened argument, and what errors call it
_SEVERAL: _About = (-1, "")
_VALUE = "__value__"  # no symbol's name


def range_text(name: str, low: int | None, high: int | None) -> str:
    """That a number is within its smallest and largest value; None where there is no bound."""
    if low is None:
        return f"{name} <= {high}"
    return f"{name} >= {low}" if high is None else f"{low} <= {name} <= {high}"


def is_object(value: object) -> bool:
    """Whether a fixed value must be this object: equality of tensors and arrays is no yes or no."""
    return isinstance(value, torch.Tensor) or bool(getattr(value, "shape", ()))
