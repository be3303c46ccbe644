"""The piece map: which statements run, before and after, as boxes and links. In: a `SourceDiff`. Out: a `PieceMap` with coordinates.

Geometry only, in pixels; how boxes look is the template's business. Long runs without a change are folded into one row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from piecework.golden.compare.diff import SourceDiff
from piecework.golden.compare.outline import Step

_ROW = 34
_BOX = 26
_LEFT = 8
_WIDTH = 300
_GAP = 90
_TOP = 34
_KEEP = 2
_FOLD_FROM = 7
_MAX_LABEL = 30

KINDS = {"piece": "piece", "inlined": "outside", "call": "call", "other": "call"}


@dataclass(frozen=True, slots=True)
class Box:
    """One statement of one side. ``status`` is same, changed, added, removed, merged or split."""

    x: int
    y: int
    width: int
    height: int
    radius: int
    kind: str
    status: str
    mark: str
    label: str
    detail: str
    title: str
    target: str

    @property
    def middle(self) -> int:
        return self.y + self.height // 2

    @property
    def baseline(self) -> int:
        return self.middle + 4

    @property
    def detail_x(self) -> int:
        return self.x + self.width - 10


@dataclass(frozen=True, slots=True)
class Link:
    """A curve from a box before to a box after."""

    path: str
    status: str


@dataclass(frozen=True, slots=True)
class Fold:
    """A row that stands for ``count`` equal statements."""

    y: int
    count: int


@dataclass(frozen=True, slots=True)
class PieceMap:
    width: int
    height: int
    boxes: tuple[Box, ...]
    links: tuple[Link, ...]
    folds: tuple[Fold, ...]
    description: str
    right: int = _LEFT + _WIDTH + _GAP


_Row = tuple[int | None, int | None]


def piece_map(diff: SourceDiff, prefix: str = "") -> PieceMap:
    """Lay out the entry functions of ``diff`` side by side; ``prefix`` starts the anchors of source lines."""
    return _Layout(diff, prefix).run()


class _Layout:
    def __init__(self, diff: SourceDiff, prefix: str) -> None:
        self.diff = diff
        self.prefix = prefix
        self.before = diff.before.entry.steps
        self.after = diff.after.entry.steps
        # A comment or a deletion below a statement is no change of what the statement calls.
        said = [
            c
            for c in diff.changes
            if c.group in ("pieces", "calls", "arguments") and not c.function
        ]
        self.changed_before = {c.before_line for c in said}
        self.changed_after = {c.after_line for c in said}
        self.merged = {i for join in diff.entry.merges for i in join.parts}
        self.merged_into = {join.whole for join in diff.entry.merges}
        self.split = {j for join in diff.entry.splits for j in join.parts}
        self.split_from = {join.whole for join in diff.entry.splits}

    def run(self) -> PieceMap:
        boxes: list[Box] = []
        folds: list[Fold] = []
        left: dict[int, Box] = {}
        right: dict[int, Box] = {}
        y = _TOP
        for row in self._folded_rows():
            if isinstance(row, int):
                folds.append(Fold(y + _BOX // 2 + 4, row))
            else:
                i, j = row
                if i is not None:
                    left[i] = self._box(self.before[i], _LEFT, y, self._status_before(i, j), "b")
                if j is not None:
                    right[j] = self._box(
                        self.after[j], _LEFT + _WIDTH + _GAP, y, self._status_after(i, j), "a"
                    )
            y += _ROW
        boxes += [*left.values(), *right.values()]
        return PieceMap(
            width=2 * (_LEFT + _WIDTH) + _GAP,
            height=y + 4,
            boxes=tuple(boxes),
            links=tuple(self._links(left, right)),
            folds=tuple(folds),
            description=f"{len(self.before)} statements before, {len(self.after)} after: {self.diff.headline}",
        )

    # --- rows --------------------------------------------------------------------------------------

    def _rows(self) -> Iterator[_Row]:
        """Paired statements share a row; the others get one of their own, those before first."""
        i = j = 0
        for i_pair, j_pair in [*self.diff.entry.pairs, (len(self.before), len(self.after))]:
            yield from ((k, None) for k in range(i, i_pair) if self._shown(self.before[k]))
            yield from ((None, k) for k in range(j, j_pair) if self._shown(self.after[k]))
            if i_pair < len(self.before) and self._shown(self.before[i_pair]):
                yield (i_pair, j_pair)
            i, j = i_pair + 1, j_pair + 1

    @staticmethod
    def _shown(step: Step) -> bool:
        return step.kind != "return"

    def _folded_rows(self) -> Iterator[_Row | int]:
        run: list[_Row] = []
        for row in [*self._rows(), None]:
            if row is not None and self._is_quiet(row):
                run.append(row)
                continue
            if len(run) >= _FOLD_FROM:
                yield from run[:_KEEP]
                yield len(run) - 2 * _KEEP
                yield from run[-_KEEP:]
            else:
                yield from run
            run = []
            if row is not None:
                yield row

    def _is_quiet(self, row: _Row) -> bool:
        i, j = row
        return i is not None and j is not None and self._status_after(i, j) == "same"

    # --- boxes and links ---------------------------------------------------------------------------

    def _status_before(self, i: int, j: int | None) -> str:
        if i in self.merged:
            return "merged"
        if i in self.split_from:
            return "split"
        if j is None:
            return "removed"
        return self._status_after(i, j)

    def _status_after(self, i: int | None, j: int) -> str:
        if j in self.split:
            return "split"
        if j in self.merged_into:
            return "merged"
        if i is None:
            return "added"
        touched = (
            self.before[i].line in self.changed_before and self.after[j].line in self.changed_after
        )
        return "changed" if touched else "same"

    def _box(self, step: Step, x: int, y: int, status: str, side: str) -> Box:
        kind = KINDS.get(step.kind, "call")
        inset = 0 if kind == "piece" else 36
        label = (
            step.callee if len(step.callee) <= _MAX_LABEL else f"…{step.callee[1 - _MAX_LABEL:]}"
        )
        return Box(
            x=x + inset,
            y=y,
            width=_WIDTH - 2 * inset,
            height=_BOX,
            radius={"piece": 3, "outside": _BOX // 2}.get(kind, 0),
            kind=kind,
            status=status,
            mark=_STATUS_MARKS[status],
            label=label,
            detail=f"{len(step.arguments)} → {len(step.results)}" if kind == "piece" else "",
            title=f"line {step.line}: {step.text}",
            target=f"{self.prefix}{side}{step.line}",
        )

    def _links(self, left: dict[int, Box], right: dict[int, Box]) -> Iterator[Link]:
        pairs = [(i, j, self._status_after(i, j)) for i, j in self.diff.entry.pairs]
        pairs += [(i, join.whole, "merged") for join in self.diff.entry.merges for i in join.parts]
        pairs += [(join.whole, j, "split") for join in self.diff.entry.splits for j in join.parts]
        drawn: set[tuple[int, int]] = set()
        for i, j, status in pairs:
            if i in left and j in right and (i, j) not in drawn:
                drawn.add((i, j))
                yield Link(_curve(left[i], right[j]), status)


_STATUS_MARKS = {
    "same": "",
    "changed": "~",
    "added": "+",
    "removed": "\N{MINUS SIGN}",
    "merged": "⇉",
    "split": "⇇",
}


def _curve(before: Box, after: Box) -> str:
    start, end = before.x + before.width, after.x
    bend = (start + end) // 2
    return f"M{start},{before.middle} C{bend},{before.middle} {bend},{after.middle} {end},{after.middle}"
