"""What an entry says, before it is text: the vocabulary between the runtime and `emit`.

A loaded model reads it when a call is refused, or to capture.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

Size = int | str  # a number, or an expression over symbols


@dataclass(frozen=True, slots=True)
class TensorInput:
    """A tensor argument, with what compiled code assumes of it."""

    dtype: torch.dtype
    device: torch.device
    sizes: tuple[Size, ...]  # one per dimension
    strides: tuple[Size, ...] | None = None  # None for a contiguous tensor
    # ``torch.Tensor`` or ``torch.nn.Parameter``, which the model's code may tell apart
    kind: type = torch.Tensor
    # whether it recorded gradients, likewise; None if no code asked
    requires_grad: bool | None = None
    # its value, for a single number that the trace looked at: a constant, or the symbol that stands
    # for it
    item: float | str | None = None


@dataclass(frozen=True, slots=True)
class UnusedTensor:
    """A tensor argument that the trace did not come across."""

    dtype: torch.dtype
    device: torch.device
    rank: int


@dataclass(frozen=True, slots=True)
class SameObject:
    """An argument that was the same tensor as flattened argument ``index``."""

    index: int


@dataclass(frozen=True, slots=True)
class IntegerInput:  # that stayed symbolic
    symbol: str


@dataclass(frozen=True, slots=True)
class FixedValue:  # that the trace has built in
    value: object


@dataclass(frozen=True, slots=True)
class WatchedObject:
    """An object whose class is no tensor: ``arguments_as_traced`` compares it."""


Assumption = TensorInput | UnusedTensor | SameObject | IntegerInput | FixedValue | WatchedObject


@dataclass(frozen=True, slots=True)
class Leaf:
    """One flattened argument."""

    index: int
    label: str
    assumption: Assumption


@dataclass(frozen=True, slots=True)
class Items:
    """A list, tuple or dict of arguments, by exact type; ``keys`` are positions or keys."""

    kind: type
    label: str
    keys: tuple[object, ...]
    children: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Tree:
    """A container of another type: flattened and compared by its structure."""

    label: str
    structure: object
    children: tuple[Leaf, ...]


Node = Leaf | Items | Tree


@dataclass(frozen=True, slots=True)
class Parameter:
    """``kind`` is ``""``, ``"/"`` positional only, ``"k"`` keyword only, ``"*"`` or ``"**"``."""

    name: str
    kind: str
    node: Node
    default: FixedValue | None = None


@dataclass(frozen=True, slots=True)
class Symbol:
    """A symbolic size: its smallest and largest value; None where there is no bound."""

    name: str
    low: int | None = None
    high: int | None = None


@dataclass(frozen=True, slots=True)
class FromLeaf:
    """A flattened argument, or what ``read`` says of it: ``.size(0)``, ``.storage_offset()``."""

    index: int
    read: str = ""


@dataclass(frozen=True, slots=True)
class FromSymbol:
    name: str


@dataclass(frozen=True, slots=True)
class FromWeights:  # fetched for every call
    index: int


@dataclass(frozen=True, slots=True)
class FromOutput:  # of the graph
    index: int


@dataclass(frozen=True, slots=True)
class FromConst:
    """A value that does not depend on the arguments, or that the checks fix."""

    value: object


@dataclass(frozen=True, slots=True)
class FromItems:
    """A list, tuple or dict, by exact type."""

    kind: type
    keys: tuple[object, ...]
    children: tuple[Packed, ...]


@dataclass(frozen=True, slots=True)
class FromCall:
    """Another container, rebuilt by ``rebuild(children, context)``."""

    rebuild: object
    context: object
    type_name: str
    children: tuple[Packed, ...]


Passed = FromLeaf | FromSymbol | FromConst | FromWeights
Packed = FromLeaf | FromOutput | FromWeights | FromConst | FromItems | FromCall


@dataclass(frozen=True, slots=True)
class NotHeld:
    """A tensor argument that could be one of the model's: code may ask ``x is self.mask``."""

    leaf: int
    others: tuple[int, ...]  # weights, by number, that it must not be
    apart: tuple[int, ...]  # weights, by number, that it must not share memory with


@dataclass(frozen=True, slots=True)
class EntryPlan:
    """Everything that the entry's source says."""

    banner: tuple[str, ...]  # lines of the header comment
    parameters: tuple[Parameter, ...]  # the model's own
    symbols: tuple[Symbol, ...]  # in the order in which their values are found
    guards: tuple[str, ...]  # conditions over symbols
    passed: tuple[Passed, ...]  # arguments of ``execution_fn``, in order
    outputs: tuple[str, ...]  # wished-for names of the graph's outputs
    result: Packed  # how the result is packed
    # the size that chooses ``__vllm_submods__``; None if there is one list
    batch: Passed | None = None
    # flattened arguments that a piece writes, each with the other ones; compiled code assumes that
    # they share no memory
    apart: tuple[tuple[int, tuple[int, ...]], ...] = ()
    held: tuple[str, ...] = ()  # paths of the model's tensors
    not_held: tuple[NotHeld, ...] = ()
    binds: bool = False  # the stitching source holds weights, so they must be watched
    # the trace relied on more of the arguments than can be written down here
    watches_arguments: bool = False
    checks: bool = True  # write the checks; without them only values are unpacked
    # the model's code asks whether gradients are recorded, so only calls that record none are
    # served
    asks_grad_mode: bool = False
    # torch's symbol → what it is called here
    names: Mapping[str, str] = field(default_factory=dict)


def leaves_of(node: Node) -> Iterator[Leaf]:
    """The flattened arguments of a parameter."""
    if isinstance(node, Leaf):
        yield node
        return
    for child in node.children:
        yield from leaves_of(child)


def parts_of(packed: Packed) -> Iterator[Packed]:
    """A result and what it is packed of."""
    yield packed
    for child in packed.children if isinstance(packed, (FromItems, FromCall)) else ():
        yield from parts_of(child)


def reads_weights(plan: EntryPlan) -> bool:
    """Whether a weight is passed or returned that is fetched for every call."""
    return any(isinstance(each, FromWeights) for each in (*plan.passed, *parts_of(plan.result)))
