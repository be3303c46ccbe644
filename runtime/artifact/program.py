"""What a trace has that was read. In: what was saved of its graphs and its assumptions. Out: the same values, graphs read when somebody asks for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

from piecework.codegen import SplitItem
from piecework.codegen.entry.plan import Symbol
from piecework.codegen.graph.origin import graph_of
from piecework.codegen.graph.structure import input_signature, structure_of
from piecework.errors import ArtifactError
from piecework.runtime import torch_compat
from piecework.runtime.pieces.piecewise import PiecewiseBackend
from piecework.runtime.pieces.program import Graphs
from piecework.runtime.trace.assumptions import Assumptions


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


def graphs_reader(
    data: Callable[[], bytes] | None, where: str, backends: Mapping[str, PiecewiseBackend]
) -> Callable[[], Graphs]:
    """What reads the graphs of a trace, once, and gives its pieces theirs.

    It raises `ArtifactError` where there are none, or this torch can't read them.
    """

    @cache
    def read() -> Graphs:
        hint = "compile the model without artifact= to capture, dump or edit it"
        if data is None:
            raise ArtifactError("the artifact holds no graphs", where=where, hint=hint)
        try:
            (graph, split_gm, rows), _ = torch_compat.graphs_from_bytes(data())  # type: ignore[misc]
        except ArtifactError:
            raise
        except Exception as error:
            raise ArtifactError(
                f"the graphs can't be read: {error}", where=where, hint=hint
            ) from error
        for name, backend in backends.items():
            backend.graph = graph_of(split_gm, name)
            backend.structure = structure_of(backend.graph, describe_input=input_signature)
        items = (SplitItem(*row, split_gm.get_submodule(row[0])) for row in rows)
        return Graphs(graph, split_gm, tuple(items))

    return read
