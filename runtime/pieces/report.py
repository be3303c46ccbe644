"""What a compilation did, in numbers."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Self

from piecework.codegen.graph.origin import SymbolNames, origin_of_piece
from piecework.codegen.graph.structure import Structure
from piecework.runtime.batch.ranges import Range
from piecework.runtime.compilers.passes import PassReport
from piecework.runtime.pieces.piecewise import PiecewiseBackend


@dataclass(frozen=True, slots=True)
class Piece:
    name: str  # its submodule in ``split_gm``
    key: str  # equal for pieces that are the same program
    modules: str  # the module paths that it holds, ``first … last``
    seconds: float  # time in the compiler; 0 when an equal piece was compiled before (``reused``)
    reused: bool

    @classmethod
    def of(cls, name: str, compiled: PiecewiseBackend) -> Self:
        """What a report says of a piece that was compiled."""
        graph, structure = compiled.compiled_of()
        modules = origin_of_piece(graph, SymbolNames()).module
        return cls(name, structure.key, modules, compiled.seconds, compiled.reused)


class RangeRow(NamedTuple):
    """The compiled forms for one range of batch sizes: how many were made, in how many seconds."""

    batches: str
    compiles: int
    seconds: float

    @classmethod
    def of(cls, compile_range: Range | None, compiled: Iterable[PiecewiseBackend]) -> Self:
        entries = [piece.entries[compile_range] for piece in compiled]
        made = sum(not entry.reused for entry in entries)
        return cls(str(compile_range or "all"), made, sum(entry.seconds for entry in entries))


@dataclass(frozen=True, slots=True)
class Report:
    """A compilation in numbers; ``str()`` gives the text that the command line prints."""

    model: str
    compiler: str
    pieces: int  # number of compiled pieces
    unique: int  # number of different ones, which is how often the compiler ran per range
    splitting: int  # number of splitting submodules
    phases: Mapping[str, float]  # seconds per phase, in order
    # one row per range of batch sizes; a single one where there are no ranges
    ranges: tuple[RangeRow, ...]
    differences: tuple[str, ...]  # where pieces of nearly the same form differ first
    # what the graph passes matched; None unless ``pass_config.report_matches``
    passes: PassReport | None = None
    layers: str = ""  # how many repeated layers one trace served, or why each was traced

    @property
    def seconds(self) -> float:
        return sum(self.phases.values())

    def __str__(self) -> str:
        cut = f"between {counted(self.splitting, 'splitting submodule')}"
        if self.pieces > 1 and not self.splitting:
            cut = "cut between repeated blocks"
        phases = ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in self.phases.items())
        lines = [
            f"{self.model}: {counted(self.pieces, 'piece')}, {self.unique} unique, {cut}",
            f"compiler {self.compiler}, {self.seconds:.2f} s: {phases}",
        ]
        for row in self.ranges if len(self.ranges) > 1 else ():
            made = f"{counted(row.compiles, 'compile')}, {row.seconds:.2f} s"
            lines.append(f"batch {row.batches}: {made}")
        lines += [self.layers] if self.layers else []
        lines += [] if self.passes is None else str(self.passes).splitlines()
        return "\n".join([*lines, *self.differences])


def differences(structures: Mapping[str, Structure]) -> tuple[str, ...]:
    """For each unique piece of nearly the form of one before it, where they differ first."""
    unique: dict[str, tuple[str, Structure]] = {}
    found: list[str] = []
    for name, structure in structures.items():
        if structure.key in unique:
            continue
        near = []
        for other, before in unique.values():
            if len(before.lines) == len(structure.lines):
                pairs = zip(before.lines, structure.lines, strict=True)
                near.append((other, [pair for pair in pairs if pair[0] != pair[1]]))
        other, apart = min(near, key=lambda each: len(each[1]), default=("", []))
        if 0 < len(apart) <= len(structure.lines) // 4:
            lines = "\n  ".join(apart[0])
            found.append(f"not shared: {other} and {name} differ first at\n  {lines}")
        unique[structure.key] = name, structure
    return tuple(found)


def counted(number: int, noun: str) -> str:
    """``1 piece``, ``2 pieces``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
