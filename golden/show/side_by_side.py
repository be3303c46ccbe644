"""Two texts side by side, in colour. In: two Python texts. Out: blocks of rows whose cells are safe HTML.

Every character of the input is escaped; nothing is fetched, and nothing is said about meaning.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from piecework.golden.show.visible import visible
from piecework.runtime.observe.highlight import Styles, line_html, token_styles

_WORD = re.compile(r"\w+|\s+|[^\w\s]")
_CONTEXT = 3


@dataclass(frozen=True, slots=True)
class Row:
    """``kind`` is equal, changed, removed or added; a number of None is an empty cell."""

    kind: str
    before_number: int | None
    before: Markup
    after_number: int | None
    after: Markup


@dataclass(frozen=True, slots=True)
class Block:
    """Rows that are shown together; ``folded`` ones are equal and far from any difference."""

    folded: bool
    rows: tuple[Row, ...]


def side_by_side(before: str, after: str) -> list[Block]:
    """Align two texts line by line; characters that would not be seen are written as escapes."""
    before, after = visible(before), visible(after)
    left, right = before.splitlines(), after.splitlines()
    left_styles, right_styles = token_styles(before), token_styles(after)

    def cell(lines: Sequence[str], styles: Sequence[Styles], at: int, marks: set[int]) -> Markup:
        return line_html(lines[at], styles[at], marks)

    none = Markup("")
    blocks: list[Block] = []
    matcher = difflib.SequenceMatcher(None, left, right, autojunk=False)
    codes = matcher.get_opcodes()
    for position, (tag, i1, i2, j1, j2) in enumerate(codes):
        if tag == "equal":
            rows = [
                Row(
                    "equal",
                    i + 1,
                    cell(left, left_styles, i, set()),
                    j + 1,
                    cell(right, right_styles, j, set()),
                )
                for i, j in zip(range(i1, i2), range(j1, j2), strict=True)
            ]
            blocks += _fold(rows, first=position == 0, last=position == len(codes) - 1)
            continue
        rows = []
        for i, j in _pair_lines(left[i1:i2], right[j1:j2]):
            old = None if i is None else i1 + i
            new = None if j is None else j1 + j
            if old is not None and new is not None:
                marks = _differing(left[old], right[new])
                old_cell = cell(left, left_styles, old, marks[0])
                new_cell = cell(right, right_styles, new, marks[1])
                rows.append(Row("changed", old + 1, old_cell, new + 1, new_cell))
            elif old is not None:
                old_cell = cell(left, left_styles, old, set())
                rows.append(Row("removed", old + 1, old_cell, None, none))
            elif new is not None:
                rows.append(
                    Row("added", None, none, new + 1, cell(right, right_styles, new, set()))
                )
        blocks.append(Block(False, tuple(rows)))
    return blocks


def _fold(rows: list[Row], *, first: bool, last: bool) -> Iterator[Block]:
    """Keep a few equal rows next to differences and fold the rest."""
    head = 0 if first else _CONTEXT
    tail = 0 if last else _CONTEXT
    if len(rows) <= head + tail + 2:
        yield Block(False, tuple(rows))
        return
    end = len(rows) - tail
    for folded, part in ((False, rows[:head]), (True, rows[head:end]), (False, rows[end:])):
        if part:
            yield Block(folded, tuple(part))


def _pair_lines(before: list[str], after: list[str]) -> Iterator[tuple[int | None, int | None]]:
    """Put similar lines next to each other, in order."""
    if len(before) * len(after) > 4000:
        longest = max(len(before), len(after))
        for k in range(longest):
            yield (k if k < len(before) else None, k if k < len(after) else None)
        return
    ratios = [[_ratio(b, a) for a in after] for b in before]
    best = [[0.0] * (len(after) + 1) for _ in range(len(before) + 1)]
    for i in range(len(before) - 1, -1, -1):
        for j in range(len(after) - 1, -1, -1):
            pair = best[i + 1][j + 1] + ratios[i][j] if ratios[i][j] > 0.45 else 0.0
            best[i][j] = max(best[i + 1][j], best[i][j + 1], pair)
    i = j = 0
    while i < len(before) or j < len(after):
        if i == len(before):
            yield None, j
            j += 1
        elif j == len(after):
            yield i, None
            i += 1
        elif ratios[i][j] > 0.45 and best[i][j] == best[i + 1][j + 1] + ratios[i][j]:
            yield i, j
            i, j = i + 1, j + 1
        elif best[i][j] == best[i + 1][j]:
            yield i, None
            i += 1
        else:
            yield None, j
            j += 1


def _ratio(before: str, after: str) -> float:
    left, right = set(_WORD.findall(before)), set(_WORD.findall(after))
    left.discard(" ")
    right.discard(" ")
    return len(left & right) / len(left | right) if left | right else 1.0


def _differing(before: str, after: str) -> tuple[set[int], set[int]]:
    """Columns of the words in which two lines differ."""
    left, right = _WORD.findall(before), _WORD.findall(after)
    marks: tuple[set[int], set[int]] = (set(), set())
    matcher = difflib.SequenceMatcher(None, left, right, autojunk=False)
    for tag, i1, i2, j1, j2 in matcher.get_opcodes():
        if tag != "equal":
            for side, words, low, high in ((0, left, i1, i2), (1, right, j1, j2)):
                start = sum(map(len, words[:low]))
                marks[side].update(range(start, start + sum(map(len, words[low:high]))))
    return marks
