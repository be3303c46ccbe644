"""What an entry checks of a call, as one table. In: an `EntryPlan`. Out: its bindings and checks, in the order in which a call meets them.

The emitted test (`steps`, which `emit` writes and `proof` reads), the explanation of a refusal and the check of captured sizes are readings of
this table, each with a `match` over all kinds. Nothing here is source text, and nothing of a call is looked at but sizes (`holds`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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
from piecework.codegen.plan.size_text import evaluate

# --- where a value is ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Whole:
    """What a parameter, by its number, was given."""

    parameter: int


@dataclass(frozen=True, slots=True)
class Part:
    """An element of a list, tuple or dict."""

    of: Where
    key: object


@dataclass(frozen=True, slots=True)
class Flat:
    """A leaf of a container that `TakeTree` flattened."""

    of: Where
    number: int


Where = Whole | Part | Flat

# --- bindings ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TakeLeaf:
    """Flattened argument ``leaf`` is what is there; all that follows calls it by its number."""

    leaf: int
    label: str
    where: Where


@dataclass(frozen=True, slots=True)
class TakeTree:
    """A container is flattened to its leaves and its structure."""

    where: Where


@dataclass(frozen=True, slots=True)
class TakeShape:
    """A tensor's sizes: one name per dimension, the symbol that is found there, or None for a size that is only compared."""

    leaf: int
    symbols: tuple[str | None, ...]


@dataclass(frozen=True, slots=True)
class TakeItem:
    """The value of a single number is a symbol."""

    leaf: int
    symbol: str


@dataclass(frozen=True, slots=True)
class TakeInteger:
    """An integer argument is a symbol."""

    leaf: int
    symbol: str


Binding = TakeLeaf | TakeTree | TakeShape | TakeItem | TakeInteger

# --- checks of containers ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class KindIs:
    """A list, tuple or dict, by exact type."""

    where: Where
    label: str
    kind: type


@dataclass(frozen=True, slots=True)
class KeysAre:
    """As many elements, and of a dict these keys."""

    where: Where
    label: str
    kind: type
    keys: tuple[object, ...]


@dataclass(frozen=True, slots=True)
class StructureIs:
    """What `TakeTree` found is of this structure."""

    where: Where
    label: str
    structure: object


# --- checks of one flattened argument ------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ClassIs:
    """A tensor of this class; None for any plain one."""

    leaf: int
    kind: type | None


@dataclass(frozen=True, slots=True)
class DtypeIs:
    leaf: int
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Strided:
    """The layout is that of plain memory."""

    leaf: int


@dataclass(frozen=True, slots=True)
class DeviceIs:
    leaf: int
    device: torch.device


@dataclass(frozen=True, slots=True)
class RankIs:
    leaf: int
    rank: int


@dataclass(frozen=True, slots=True)
class Contiguous:
    leaf: int


@dataclass(frozen=True, slots=True)
class NotNegated:
    leaf: int


@dataclass(frozen=True, slots=True)
class NotConjugated:
    leaf: int


@dataclass(frozen=True, slots=True)
class GradIs:
    leaf: int
    requires_grad: bool


@dataclass(frozen=True, slots=True)
class ShapeIs:
    """All sizes are numbers."""

    leaf: int
    sizes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SizeIs:
    """A size that `TakeShape` gave no symbol: a number, a symbol that is known, or an expression over those."""

    leaf: int
    dim: int
    size: Size


@dataclass(frozen=True, slots=True)
class StrideIs:
    leaf: int
    dim: int
    size: Size


@dataclass(frozen=True, slots=True)
class ItemIs:
    """The value of a single number: a constant, or an expression over symbols."""

    leaf: int
    value: float | str


@dataclass(frozen=True, slots=True)
class IsInteger:
    leaf: int


@dataclass(frozen=True, slots=True)
class IntegerIs:
    """An integer argument that is an expression over symbols, or a symbol that was found before."""

    leaf: int
    size: str


@dataclass(frozen=True, slots=True)
class ValueIs:
    """A Python value, by type and equality; the very object is good enough, and needed of a tensor or an array."""

    leaf: int
    value: object

    @property
    def is_object(self) -> bool:
        """Whether it must be this object: equality of tensors and arrays is no yes or no."""
        return isinstance(self.value, torch.Tensor) or bool(getattr(self.value, "shape", ()))


# --- checks of symbols ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class InRange:
    """A symbol's smallest and largest value; one of them may be None."""

    symbol: str
    low: int | None
    high: int | None


@dataclass(frozen=True, slots=True)
class Relation:
    """A condition over symbols, as a text of `size_text`."""

    text: str


# --- checks of several arguments -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SameAs:
    leaf: int
    other: int
    other_label: str


@dataclass(frozen=True, slots=True)
class Distinct:
    """No two of them are one object."""

    leaves: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Apart:
    """What is written shares no memory with the others."""

    leaf: int
    others: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class AsTraced:
    """Whatever else the trace read of the arguments is as it was."""


ContainerCheck = KindIs | KeysAre | StructureIs
TensorCheck = (
    ClassIs
    | DtypeIs
    | Strided
    | DeviceIs
    | RankIs
    | Contiguous
    | NotNegated
    | NotConjugated
    | GradIs
    | ShapeIs
)
NumberCheck = SizeIs | StrideIs | ItemIs | IntegerIs
PythonCheck = IsInteger | ValueIs
SymbolCheck = InRange | Relation
TogetherCheck = SameAs | Distinct | Apart | AsTraced
Check = ContainerCheck | TensorCheck | NumberCheck | PythonCheck | SymbolCheck | TogetherCheck


@dataclass(frozen=True, slots=True)
class Require:
    """Checks that are made together; ``about`` says of what, for readers."""

    about: str
    checks: tuple[Check, ...]


Step = Binding | Require


def entry_table(plan: EntryPlan) -> tuple[Step, ...]:
    """Everything that ``plan`` assumes of a call: each value is bound and looked at before what is in it."""
    return tuple(_Table(plan).steps())


def holds(check: SymbolCheck, values: Mapping[str, int]) -> bool:
    """Whether numbers for the symbols keep a check."""
    match check:
        case InRange(symbol, low, high):
            value = values[symbol]
            return (low is None or value >= low) and (high is None or value <= high)
        case Relation(text):
            return bool(evaluate(text, values))
        case _:
            assert_never(check)


class _Table:
    """What was met so far: symbols that are known, tensors, and what can be checked only in the end."""

    def __init__(self, plan: EntryPlan) -> None:
        self.plan = plan
        self.sized = {symbol.name for symbol in plan.symbols}
        self.labels: dict[int, str] = {}
        self.known: set[str] = set()
        self.tensors: list[int] = []
        self.same: list[Require] = []
        self.late: list[Check] = []  # over symbols that are all known in the end

    def steps(self) -> Iterator[Step]:
        plan = self.plan
        for number, parameter in enumerate(plan.parameters):
            yield from self._node(parameter.node, Whole(number))
        bounded = (s for s in plan.symbols if s.name in self.known)
        ranges = (InRange(s.name, s.low, s.high) for s in bounded if (s.low, s.high) != (None,) * 2)
        yield from _require("sizes that the trace allows", *ranges)
        relations = (Relation(guard) for guard in plan.guards)
        yield from _require("relations that the trace relied on", *self.late, *relations)
        yield from self.same
        if len(self.tensors) > 1:
            about = "two tensors" if len(self.tensors) == 2 else f"{len(self.tensors)} tensors"
            yield Require(about, (Distinct(tuple(self.tensors)),))
        for written, others in plan.apart:
            about = f"{self.labels[written]}: written, so no other argument may share its memory"
            yield Require(about, (Apart(written, others),))
        if plan.watches_arguments:
            yield Require("what else the trace read of the arguments", (AsTraced(),))

    def _node(self, node: Node, where: Where) -> Iterator[Step]:
        match node:
            case Leaf():
                yield from self._leaf(node, where)
            case Items(kind, label, keys, children):
                about = f"{label}: a {kind.__name__} of {len(keys)}"
                yield from _require(
                    about, KindIs(where, label, kind), KeysAre(where, label, kind, keys)
                )
                for key, child in zip(keys, children, strict=True):
                    yield from self._node(child, Part(where, key))
            case Tree(label, structure, children):
                yield TakeTree(where)
                yield from _require(
                    f"{label}: of the traced structure", StructureIs(where, label, structure)
                )
                for number, child in enumerate(children):
                    yield from self._leaf(child, Flat(where, number))
            case _:
                assert_never(node)

    def _leaf(self, leaf: Leaf, where: Where) -> Iterator[Step]:
        index, label = leaf.index, leaf.label
        self.labels[index] = label
        yield TakeLeaf(index, label, where)
        match leaf.assumption:
            case TensorInput():
                yield from self._tensor(index, label, leaf.assumption)
            case UnusedTensor(dtype, device, rank):
                self.tensors.append(index)
                checks = (ClassIs(index, None), *_kind(index, dtype, device, rank))
                yield Require(f"{label}: not read by the model", checks)
            case SameObject(other, other_label):
                about = f"{label}: the same tensor as {other_label}"
                self.same.append(Require(about, (SameAs(index, other, other_label),)))
            case IntegerInput(symbol):
                yield from self._integer(index, label, symbol)
            case FixedValue(value):
                yield Require(f"{label}: fixed by the trace", (ValueIs(index, value),))
            case WatchedObject():
                pass
            case _:
                assert_never(leaf.assumption)

    def _integer(self, index: int, label: str, symbol: str) -> Iterator[Step]:
        yield Require(f"{label}: an integer", (IsInteger(index),))
        if symbol.isidentifier() and symbol not in self.known:
            self.known.add(symbol)
            yield TakeInteger(index, symbol)
        else:
            self.late.append(IntegerIs(index, symbol))

    def _tensor(self, index: int, label: str, tensor: TensorInput) -> Iterator[Step]:
        self.tensors.append(index)
        checks = [*_tensor_checks(index, tensor)]
        layout = "contiguous" if tensor.strides is None else "strided as traced"
        short = f"{str(tensor.dtype).removeprefix('torch.')}[{', '.join(map(str, tensor.sizes))}]"
        about = f"{label}: {short} on {tensor.device}, {layout}"
        numbers = tuple(size for size in tensor.sizes if isinstance(size, int))
        if numbers and len(numbers) == len(tensor.sizes):
            yield Require(about, (*checks, ShapeIs(index, numbers)))
        else:
            yield Require(about, tuple(checks))
            yield from self._sizes(index, tensor.sizes)
        yield from self._item(index, label, tensor.item)
        for dim, stride in enumerate(tensor.strides or ()):
            self.late.append(StrideIs(index, dim, stride))

    def _sizes(self, index: int, sizes: Sequence[Size]) -> Iterator[Step]:
        """A symbol that is met for the first time is taken from the shape; all else is compared, at once or in the end."""
        taken: list[str | None] = []
        now: list[Check] = []
        for dim, size in enumerate(sizes):
            if isinstance(size, str) and size in self.sized and size not in self.known:
                self.known.add(size)
                taken.append(size)
                continue
            taken.append(None)
            at_once = isinstance(size, int) or size in self.known
            (now if at_once else self.late).append(SizeIs(index, dim, size))
        if taken:
            yield TakeShape(index, tuple(taken))
        yield from _require("", *now)

    def _item(self, index: int, label: str, item: float | str | None) -> Iterator[Step]:
        """The value of a single number, where the trace looked at it."""
        if item is None:
            return
        if not isinstance(item, str):
            yield Require(f"{label}: its value", (ItemIs(index, item),))
        elif item.isidentifier() and item not in self.known:
            self.known.add(item)
            yield TakeItem(index, item)
        else:
            self.late.append(ItemIs(index, item))


def _require(about: str, *checks: Check) -> Iterator[Require]:
    if checks:
        yield Require(about, checks)


def _kind(leaf: int, dtype: torch.dtype, device: torch.device, rank: int) -> tuple[Check, ...]:
    return DtypeIs(leaf, dtype), Strided(leaf), DeviceIs(leaf, device), RankIs(leaf, rank)


def _tensor_checks(leaf: int, tensor: TensorInput) -> Iterator[Check]:
    """What doesn't need a size. Integers are never negated or conjugated lazily, and never require gradients."""
    yield ClassIs(leaf, tensor.kind)
    yield from _kind(leaf, tensor.dtype, tensor.device, len(tensor.sizes))
    if tensor.strides is None:
        yield Contiguous(leaf)
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        yield NotNegated(leaf)
        if tensor.requires_grad is not None:
            yield GradIs(leaf, tensor.requires_grad)
    if tensor.dtype.is_complex:
        yield NotConjugated(leaf)
