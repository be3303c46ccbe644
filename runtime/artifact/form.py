"""What is kept of one trace: the vocabulary of `save` and `load`. All classes are frozen and hold no object of a process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from piecework.codegen.stitch.source import StitchedSource
from piecework.runtime import torch_compat
from piecework.runtime.batch.ranges import Range
from piecework.runtime.call.edited import EditedSource
from piecework.runtime.call.entry_plan import MadeEntry
from piecework.runtime.pieces.program import Batch
from piecework.runtime.pieces.ranks import Together
from piecework.runtime.pieces.report import Report
from piecework.runtime.trace.inputs import Argument, Layout, Size
from piecework.runtime.watch.state import SavedState
from piecework.runtime.watch.values import Path

STITCHED, ENTRY, CAREFUL, EDITED = "stitched.py", "entry.py", "careful.py", "edited.py"
STATE, GRAPHS = "state.pickle", "graphs.pickle"


@dataclass(frozen=True, slots=True)
class DirectConst:
    """A constant of the stitching source that is the implementation of an operator, whichever it is in a process."""

    op: object


@dataclass(frozen=True, slots=True)
class SavedWeight:
    """A weight: what it is, and all its names in the model."""

    path: str
    dtype: torch.dtype
    layout: torch.layout
    device: torch.device
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    way: Path
    names: frozenset[str]


@dataclass(frozen=True, slots=True)
class WeightInput:
    """A graph input that is weight number ``index``."""

    index: int


@dataclass(frozen=True, slots=True)
class SavedForm:
    """A compiled form of a piece: its text, how many inputs it takes, and what else `PieceLoader.piece` needs."""

    file: str
    inputs: int
    strict: frozenset[int]
    inductor: bool


@dataclass(frozen=True, slots=True)
class SavedProgram:
    """A compiled program, without a model.

    Attributes:
        rows: of the report: name, key, modules, seconds and whether it was reused, per piece.
        source: without its text, which lies in a file of its own, and without implementations of operators.
        direct: operators called past the dispatcher → device type.
        careful_consts: of the stitching source without shortcuts.
        forms: submodule → range → its form.
        sizes: submodule → which of its inputs are sizes.
        together: what processes that run it together must agree on.
    """

    name: str
    compiler: str
    report: Report
    rows: tuple[tuple[str, str, str, float, bool], ...]
    ranges: tuple[Range, ...] | None
    batch: Batch
    source: StitchedSource
    direct: Mapping[object, str]
    careful_consts: tuple[object, ...]
    forms: Mapping[str, Mapping[Range | None, SavedForm]]
    sizes: Mapping[str, tuple[int, ...]]
    together: Together


@dataclass(frozen=True, slots=True)
class SavedTrace:
    """One trace: a program, bound to a model.

    Attributes:
        made, edited: without their texts.
        memory: which weights shared memory, where the graph writes to some: a number per weight.
        symbols: torch's symbol → how it is called.
    """

    program: SavedProgram
    made: MadeEntry
    inputs: tuple[WeightInput | Argument | Size | Layout, ...]
    weights: tuple[SavedWeight, ...]
    memory: tuple[int, ...] | None
    state: SavedState
    symbols: Mapping[str, str]
    as_marked: bool
    rows_in_one: bool
    edited: EditedSource | None


def partition(tensors: Sequence[torch.Tensor]) -> tuple[int, ...]:
    """A number per tensor, equal for those in one memory."""
    stores = [torch_compat.storage_id(each) for each in tensors]
    return tuple(map(stores.index, stores))
