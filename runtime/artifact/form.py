"""What is kept of one trace. In: nothing; this is the vocabulary of `save` and `load`. All classes are frozen and hold no object of a process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from piecework.codegen.entry.plan import EntryPlan
from piecework.codegen.plan import ir
from piecework.codegen.proof.verify import Proof
from piecework.runtime import torch_compat
from piecework.runtime.artifact.facts import SavedState
from piecework.runtime.batch.ranges import Range
from piecework.runtime.call.argument_memory import GivenTensor
from piecework.runtime.pieces.program import Batch
from piecework.runtime.pieces.ranks import Together
from piecework.runtime.pieces.report import Report
from piecework.runtime.trace.inputs import Argument, Layout, Size

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
    source: str
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
class SavedTrace:
    """One trace.

    Attributes:
        memory: which weights shared memory, where the graph writes to some: a number per weight.
        forms: submodule → range → its form.
        sizes: submodule → which of its inputs are sizes.
        direct: operators called past the dispatcher → device type.
        consts, careful_consts: of the stitching source, and of the one without shortcuts.
        entry_consts: of the entry's text.
        symbols: torch's symbol → how it is called.
        together: what processes that run it together must agree on.
        edited: the first difference of an edited source from the graph; None for none.
    """

    name: str
    compiler: str
    report: Report
    rows: tuple[tuple[str, str, str, float, bool], ...]
    ranges: tuple[Range, ...] | None
    batch: Batch
    module: ir.Module
    lines: Mapping[int, ir.Origin]
    bound: Mapping[str, str]
    proof: Proof | None
    direct: Mapping[object, str]
    consts: tuple[object, ...]
    careful_consts: tuple[object, ...]
    forms: Mapping[str, Mapping[Range | None, SavedForm]]
    sizes: Mapping[str, tuple[int, ...]]
    plan: EntryPlan
    entry_consts: Mapping[str, object]
    strict: frozenset[str]
    given: tuple[GivenTensor, ...]
    autocast: tuple[tuple[str, torch.dtype], ...]
    inputs: tuple[WeightInput | Argument | Size | Layout, ...]
    weights: tuple[SavedWeight, ...]
    memory: tuple[int, ...] | None
    state: SavedState
    symbols: Mapping[str, str]
    as_marked: bool
    rows_in_one: bool
    edited_proof: Proof | None
    edited_difference: str | None
    together: Together


def partition(tensors: Sequence[torch.Tensor]) -> tuple[int, ...]:
    """A number per tensor, equal for those in one memory."""
    stores = [torch_compat.storage_id(each) for each in tensors]
    return tuple(map(stores.index, stores))
