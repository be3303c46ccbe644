"""A `Program` that was read. In: what was saved of one, and compiled pieces. Out: the same value, whose graphs are read when somebody asks for them.

Calls need no graph; captures, dumps and edits do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch.fx

from piecework.codegen import SplitItem
from piecework.codegen.entry.plan import Symbol
from piecework.codegen.graph.structure import input_signature, structure_of
from piecework.codegen.stitch.bind import compile_execution_fn
from piecework.errors import ArtifactError
from piecework.runtime import torch_compat
from piecework.runtime.bind.weights import BoundWeights
from piecework.runtime.pieces.program import Callables, Program
from piecework.runtime.pieces.ranks import Together
from piecework.runtime.pieces.report import Piece, Report
from piecework.runtime.trace.assumptions import Assumptions
from piecework.runtime.trace.tracing import Capture

Consts = tuple[object, ...]


@dataclass(frozen=True, slots=True)
class SavedGraphs:
    """The graphs of one trace: the traced one, the stitching graph, and which of its submodules are what."""

    graph: torch.fx.GraphModule
    split_gm: torch.fx.GraphModule
    items: tuple[tuple[str, int, bool], ...]


class LoadedProgram(Program):
    """A `Program` without graphs; see there.

    Args:
        fields: those of `Program` but the graphs.
        read_graphs: reads them; raises `ArtifactError` where none were saved.
        careful: the stitching source without shortcuts, and its constants.
        rows: of `pieces`, without what is called.
        made: the report of the compilation.
        together: what processes that run it together must agree on.
    """

    __slots__ = ("_careful", "_made", "_read", "_read_graphs", "_rows", "_together")

    def __init__(
        self,
        fields: Mapping[str, Any],
        read_graphs: Callable[[], SavedGraphs],
        careful: tuple[str, Consts],
        rows: tuple[tuple[str, str, str, float, bool], ...],
        made: Report,
        together: Together,
    ) -> None:
        for name, value in fields.items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "_read_graphs", read_graphs)
        object.__setattr__(self, "_careful", careful)
        object.__setattr__(self, "_rows", rows)
        object.__setattr__(self, "_made", made)
        object.__setattr__(self, "_together", together)
        object.__setattr__(self, "_read", [])

    def _graphs(self) -> SavedGraphs:
        read: list[SavedGraphs] = self._read  # type: ignore[attr-defined]
        if not read:
            found = self._read_graphs()  # type: ignore[attr-defined]
            for name, backend in self.backends.items():
                piece = found.split_gm.get_submodule(name)
                assert isinstance(piece, torch.fx.GraphModule)
                backend.graph = piece
                backend.structure = structure_of(piece, describe_input=input_signature)
            read.append(found)
        return read[0]

    @property
    def graph(self) -> torch.fx.GraphModule:  # type: ignore[override]
        return self._graphs().graph

    @property
    def split_gm(self) -> torch.fx.GraphModule:  # type: ignore[override]
        return self._graphs().split_gm

    @property
    def items(self) -> tuple[SplitItem, ...]:  # type: ignore[override]
        found = self._graphs()
        return tuple(
            SplitItem(name, number, splitting, found.split_gm.get_submodule(name))  # type: ignore[arg-type]
            for name, number, splitting in found.items
        )

    def bind_safely(
        self, weights: Mapping[str, object], *, code: str | None = None
    ) -> tuple[Callable[..., object], Callable[[int], Callables]]:
        """As `Program.bind_safely`, from the text that was saved for it."""
        source = self.source
        text, consts = self._careful  # type: ignore[attr-defined]
        if code is not None:
            operators = {id(value): op for op, value in source.options.direct.items()}
            text, consts = code, tuple(operators.get(id(each), each) for each in source.consts)
        per_range = [self.callables(each) for each in self.compile_ranges]
        lists = [tuple(found[name] for name in source.submod_names) for found in per_range]
        bound = {row.name: weights[row.path] for row in source.module.bound}
        function = compile_execution_fn(
            text, per_range[-1], source.submod_names, consts, bound=bound
        )
        table = self.range_table
        return function, lambda batch: lists[0 if table is None else table.index(batch)]

    def pieces(self) -> tuple[Piece, ...]:
        first = self.compile_ranges[0]
        return tuple(
            Piece(name, key, modules, seconds, self.backends[name].runnable_for(first), reused)
            for name, key, modules, seconds, reused in self._rows  # type: ignore[attr-defined]
        )

    def together(self) -> Together:
        return self._together  # type: ignore[attr-defined,no-any-return]

    def report(self) -> Report:
        """The report of the compilation, with the seconds that loading took."""
        return replace(self._made, phases=dict(self.phases))  # type: ignore[attr-defined]


class LoadedAssumptions(Assumptions):
    """What the trace assumed, as far as captures ask: the rest is in the entry's plan."""

    def __init__(
        self, symbols: tuple[Symbol, ...], guards: tuple[str, ...], names: Mapping[str, str]
    ) -> None:
        self._found, self._texts, self._names = symbols, guards, dict(names)

    def symbols(self) -> tuple[Symbol, ...]:
        return self._found

    def guards(self) -> tuple[str, ...]:
        return self._texts


class LoadedCapture(Capture):
    """A `Capture` whose graph is its program's, read when somebody asks for it."""

    __slots__ = ("_program",)

    def __init__(self, program: LoadedProgram, fields: Mapping[str, Any]) -> None:
        self._program = program
        for name, value in fields.items():
            setattr(self, name, value)

    @property
    def graph(self) -> torch.fx.GraphModule:  # type: ignore[override]
        return self._program.graph

    def with_weights(self, weights: BoundWeights) -> Capture:
        names = ("parameters", "assumptions", "out_spec", "result")
        fields = {name: getattr(self, name) for name in names}
        inputs = self.inputs_with(weights)
        return LoadedCapture(self._program, {**fields, "inputs": inputs, "weights": weights})


def graphs_reader(data: Callable[[], bytes] | None, where: str) -> Callable[[], SavedGraphs]:
    """What reads the graphs of a trace; raises `ArtifactError` where there are none, or this torch can't read them."""

    def read() -> SavedGraphs:
        hint = "compile the model without artifact= to capture, dump or edit it"
        if data is None:
            raise ArtifactError("the artifact holds no graphs", where=where, hint=hint)
        try:
            (graph, split_gm, items), _ = torch_compat.graphs_from_bytes(data())  # type: ignore[misc]
        except ArtifactError:
            raise
        except Exception as error:
            raise ArtifactError(
                f"the graphs can't be read: {error}", where=where, hint=hint
            ) from error
        return SavedGraphs(graph, split_gm, items)

    return read
