"""Everything that one compilation made, frozen: bound to weights, served, captured, reported."""

import enum
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import FunctionType

import torch
from torch.fx import GraphModule

from piecework.codegen.graph.schemas import every_node
from piecework.codegen.split.splitting import SplitItem
from piecework.codegen.stitch.bind import compile_execution_fn
from piecework.codegen.stitch.source import StitchedSource
from piecework.runtime import torch_compat
from piecework.runtime.batch.ranges import Range, RangeTable
from piecework.runtime.config.compilation import CompilationConfig
from piecework.runtime.observe.dump import Dump
from piecework.runtime.pieces.piecewise import PiecewiseBackend
from piecework.runtime.pieces.ranks import Together
from piecework.runtime.pieces.report import Piece, Report
from piecework.runtime.watch.direct_ops import DirectOps

Callables = Sequence[Callable[..., object]]


class Trace(enum.Enum):
    """Which of a model's traces a backend is for."""

    ONLY = "the only one"
    FIRST = "the first of those that it takes"
    ANOTHER = "another"


@dataclass(frozen=True, slots=True)
class Batch:
    """Where a graph has its batch size."""

    symbol: str | None = None  # torch's symbol of it; None if no input has a dynamic dimension
    # which graph input, and which of its dimensions (None for a size itself), tells it
    input: tuple[int, int | None] = (0, None)

    def size(self, inputs: Sequence[object]) -> int:
        """The batch size that graph inputs (weights included) have."""
        index, dim = self.input
        value = inputs[index]
        return value.size(dim) if isinstance(value, torch.Tensor) and dim is not None else value  # type: ignore[return-value]


@dataclass(frozen=True, slots=True)
class Graphs:
    """The traced graph, the stitching graph, and all its submodules in order."""

    graph: GraphModule
    split_gm: GraphModule
    items: tuple[SplitItem, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Program:
    name: str
    config: CompilationConfig
    graphs: Callable[[], Graphs]  # gives the graphs; calls need none, captures, dumps and edits do
    # submodule name → its compiled forms, for those that are compiled
    backends: Mapping[str, PiecewiseBackend]
    source: StitchedSource
    # batch ranges and single sizes; None when one compiled form serves every batch
    range_table: RangeTable | None
    batch: Batch
    # the first tensor input with the batch size, and its dimension; None where none has it
    batch_place: tuple[str, int] | None
    direct_ops: DirectOps  # the splitting ops that the source calls past the dispatcher
    pieces: tuple[Piece, ...]
    together: Together  # what processes that run it together must agree on
    compiled: Report  # what the compilation did
    phases: dict[str, float]  # seconds per phase; a stage that comes later adds its own
    dump: Dump
    # ``__vllm_submods__`` for each of ``compile_ranges``
    submod_lists: tuple[list[Callable[..., object]], ...] = field(init=False)

    def __post_init__(self) -> None:
        direct = self.config.stitching_config.direct_artifact_entry
        pieces = [self.backends[name] for name in self.source.submod_names]
        forms = [each.direct_runnable_for if direct else each.runnable_for for each in pieces]
        lists = tuple([form(each) for form in forms] for each in self.compile_ranges)
        object.__setattr__(self, "submod_lists", lists)

    @property
    def graph(self) -> GraphModule:
        return self.graphs().graph

    @property
    def split_gm(self) -> GraphModule:
        return self.graphs().split_gm

    @property
    def items(self) -> tuple[SplitItem, ...]:
        return self.graphs().items

    @property
    def compile_ranges(self) -> tuple[Range | None, ...]:
        return ranges_of(self.range_table)

    def bind(
        self, weights: Mapping[str, object] | None = None, *, code: str | None = None
    ) -> FunctionType:
        """Execute the emitted source, or an edited ``code``, with the compiled pieces."""
        with timed(self.phases, "bind"):
            names = self.source.submod_names
            text = self.source.code if code is None else code
            pieces = dict(zip(names, self.submod_lists[-1], strict=True))
            function = compile_execution_fn(text, pieces, names, self.source.consts, bound=weights)
            publish_submods(function, self.submod_lists[-1])
        if code is None:
            self.dump.finish(self.backends, self.phases)
        return function

    def asks_for_default_device(self) -> bool:
        """Whether a graph makes tensors on the device that is the process's default."""
        return any(
            node.op == "call_function"
            and torch_compat.makes_tensors_where_told(node.target)
            and node.kwargs.get("device") is None
            for node in every_node(self.split_gm)
        )

    def submods_for(self, batch: int) -> list[Callable[..., object]]:
        """``__vllm_submods__`` for a batch size, in O(log ranges)."""
        return self.submod_lists[0 if self.range_table is None else self.range_table.index(batch)]

    def callables(self, compile_range: Range | None) -> dict[str, Callable[..., object]]:
        """The compiler's public form of each piece for one range of batch sizes, by name."""
        return {n: piece.runnable_for(compile_range) for n, piece in self.backends.items()}

    def report(self) -> Report:
        """What the compilation did, with the seconds that loading took where it was read."""
        return replace(self.compiled, phases=dict(self.phases))


def ranges_of(table: RangeTable | None) -> tuple[Range | None, ...]:
    return (None,) if table is None else table.entries


def publish_submods(function: Callable[..., object], submods: Callables) -> None:
    """Make ``submods`` what ``function`` uses when it is given none; a tuple is indexed faster."""
    function.__kwdefaults__["__vllm_submods__"] = tuple(submods)  # type: ignore[attr-defined,index]


@contextmanager
def timed(phases: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        with torch_compat.timed_scope(name):
            yield
    finally:
        phases[name] = phases.get(name, 0.0) + time.perf_counter() - start
