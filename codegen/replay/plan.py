"""What was captured of each piece, in words that the runtime and `emit` share.

A place is any value that is equal for equal memory, and is never looked into.
"""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from piecework.codegen.plan import ir


@dataclass(frozen=True, slots=True)
class InPlace:
    """A tensor, where it was at capture; ``owner`` keeps it there, such as ``weight``."""

    place: Hashable
    owner: str


@dataclass(frozen=True, slots=True)
class Staged:
    """A static buffer, filled before each replay, and copied back if the piece changes it."""

    writes_back: bool = False


@dataclass(frozen=True, slots=True)
class Frozen:
    """A Python value that is built into the graph."""

    value: object


Read = InPlace | Staged | Frozen


@dataclass(frozen=True, slots=True)
class PieceFacts:
    """One piece as it was captured."""

    reads: tuple[Read, ...] = ()  # one per leaf of its arguments
    # places of its results, `Frozen` for a number; a bare one if it returns no tuple
    outputs: Hashable = ()
    # why it runs uncaptured in this shape, if so; the rest is empty then
    eager_reason: str | None = None

    def output(self, element: int | None) -> Hashable:
        """The place of one result, or of the only one."""
        if element is None or not isinstance(self.outputs, tuple):
            return self.outputs
        found: Hashable = self.outputs[element]
        return found


@dataclass(frozen=True, slots=True)
class ReplayFacts:
    """Everything that was captured for one descriptor."""

    title: str  # mode and descriptor, such as ``PIECEWISE 8 tokens``
    tokens: int  # the captured size
    policy: str  # the address policy
    # parameters of the stitching function that are copied into persistent buffers
    staged: tuple[str, ...]
    sizes: Mapping[str, int]  # parameters that are numbers, frozen at the captured size
    places: Mapping[str, Hashable]  # where the other parameters and the bound weights are, by name
    pieces: tuple[PieceFacts, ...]  # one per entry of ``__vllm_submods__``
    # what follows from the captured sizes, by the name of its node
    numbers: Mapping[str, bool | int | float] = field(default_factory=dict)
    banner: tuple[str, ...] = ()  # further lines for the header


@dataclass(frozen=True, slots=True)
class Held:
    """What a name of the emitted module stands for."""

    # staging of the inputs; a parameter or bound weight; of a piece: its replay (itself, where it
    # runs uncaptured), the static buffer of an argument, a static output
    kind: Literal["stage", "input", "replay", "buffer", "output"]
    piece: int = -1
    at: int | None = None  # which argument or element; None for all of an output
    name: str = ""  # of an input


@dataclass(frozen=True, slots=True)
class ReplaySource:
    """Emitted replay source."""

    code: str  # the Python text, exactly what is executed
    held: Mapping[str, Held]  # name in the text → what it must be bound to
    # name of a number → the piece's result that it is, and its value
    numbers: Mapping[str, tuple[Held, object]]
    consts: tuple[object, ...] = field(repr=False)  # the values of ``__vllm_consts__``
    # the plan that the text was rendered from; its entry is the replay function
    module: ir.Module = field(repr=False)

    def __str__(self) -> str:
        return self.code
