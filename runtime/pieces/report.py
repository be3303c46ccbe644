"""What a compilation did, in numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from piecework.codegen.graph.structure import Structure
from piecework.runtime.passes.manager import PassReport


@dataclass(frozen=True, slots=True)
class Piece:
    """One compiled piece.

    Attributes:
        name: its submodule in ``split_gm``.
        key: equal for pieces that are the same program.
        modules: the module paths that it holds, ``first … last``.
        seconds: time in the compiler; 0 when an equal piece was compiled before.
        callable: what ``__vllm_submods__`` holds for it.
        reused: True if an equal piece was compiled before.
    """

    name: str
    key: str
    modules: str
    seconds: float
    callable: Callable[..., object]
    reused: bool


@dataclass(frozen=True, slots=True)
class RangeRow:
    """The compiled forms for one range of batch sizes: how many the compiler made, and the seconds that took."""

    batches: str
    compiles: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Difference:
    """The first place where two near-equal pieces differ."""

    left: str
    right: str
    left_line: str
    right_line: str


@dataclass(frozen=True, slots=True)
class Report:
    """A compilation in numbers; ``str()`` gives the text that the command line prints.

    Attributes:
        model: class name of the model.
        compiler: name of the piece compiler.
        pieces: number of compiled pieces.
        unique: number of different ones, which is how often the compiler ran per range.
        splitting: number of splitting submodules.
        phases: seconds per phase, in order.
        ranges: one row per range of batch sizes; a single row for all sizes where there are no ranges.
        differences: why pieces of nearly the same form were not shared.
        passes: what the graph passes matched; None unless ``pass_config.report_matches``.
        layers: how many repeated layers one trace served, or why each was traced; "" where nothing is repeated or asked for.
    """

    model: str
    compiler: str
    pieces: int
    unique: int
    splitting: int
    phases: Mapping[str, float]
    ranges: tuple[RangeRow, ...]
    differences: tuple[Difference, ...]
    passes: PassReport | None = None
    layers: str = ""

    @property
    def seconds(self) -> float:
        return sum(self.phases.values())

    def __str__(self) -> str:
        cut = f"between {counted(self.splitting, 'splitting submodule')}"
        if self.pieces > 1 and not self.splitting:
            cut = "cut between repeated blocks"
        lines = [
            f"{self.model}: {counted(self.pieces, 'piece')}, {self.unique} unique, {cut}",
            f"compiler {self.compiler}, {self.seconds:.2f} s: "
            + ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in self.phases.items()),
        ]
        if len(self.ranges) > 1:
            lines += [
                f"batch {r.batches}: {counted(r.compiles, 'compile')}, {r.seconds:.2f} s"
                for r in self.ranges
            ]
        if self.layers:
            lines.append(self.layers)
        if self.passes is not None:
            lines += str(self.passes).splitlines()
        for each in self.differences:
            lines.append(f"not shared: {each.left} and {each.right} differ first at")
            lines += [f"  {each.left_line}", f"  {each.right_line}"]
        return "\n".join(lines)


def differences(structures: Sequence[tuple[str, Structure]]) -> tuple[Difference, ...]:
    """For each unique piece, the unique piece before it of nearly the same length that it differs least from."""
    unique: dict[str, tuple[str, Structure]] = {}
    for name, structure in structures:
        unique.setdefault(structure.key, (name, structure))
    found: list[Difference] = []
    seen: list[tuple[str, Structure]] = []
    for name, structure in unique.values():
        near = [
            (_mismatches(other.lines, structure.lines), other_name, other)
            for other_name, other in seen
            if len(other.lines) == len(structure.lines)
        ]
        seen.append((name, structure))
        if not near:
            continue
        count, other_name, other = min(near, key=lambda row: row[0])
        if count > len(structure.lines) // 4:
            continue
        pairs = zip(other.lines, structure.lines, strict=True)
        left, right = next((a, b) for a, b in pairs if a != b)
        found.append(Difference(other_name, name, left, right))
    return tuple(found)


def _mismatches(left: Sequence[str], right: Sequence[str]) -> int:
    return sum(a != b for a, b in zip(left, right, strict=True))


def counted(number: int, noun: str) -> str:
    """``1 piece``, ``2 pieces``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
