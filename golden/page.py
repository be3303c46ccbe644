"""One self-contained page that shows differences: what changed, the pieces before and after, both texts side by side.

The page has no script, fetches nothing and follows the reader's light or dark setting.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from markupsafe import Markup, escape
from pygments.lexers.python import PythonLexer
from pygments.token import Comment, Keyword, Name, Number, Operator, String, _TokenType

from piecework.codegen.plan.render import environment
from piecework.errors import UsageError
from piecework.golden import snapshot
from piecework.golden.diff import COSMETIC, GROUPS, SourceDiff, compare_sources
from piecework.golden.outline import Step
from piecework.golden.show import summary, visible
from piecework.golden.snapshot import Comparison

TEMPLATE = "golden_report.html.jinja"

_WORD = re.compile(r"\d+\.\d+|\w+|\s+|[^\w\s]")
_CONTEXT = 3
_ALIKE = 0.45  # of the words of two lines, so that they stand beside each other
_ROW_MARKS = {"added": "+", "removed": "-", "changed": "~", "joined": "⇉", "same": ""}
_STATUS = {"added": "added", "removed": "removed", "merged": "joined", "split": "joined"}


@dataclass(frozen=True, slots=True)
class Entry:
    """One pair of sources to show; where the left side, ``left``, is none, ``note`` says so."""

    title: str
    before: str
    after: str
    diff: SourceDiff
    note: str = ""
    left: str = ""


def entry_of(comparison: Comparison, name: str) -> Entry:
    """An entry for a golden that differs, is missing, or is not Python."""
    after = comparison.after
    try:
        if comparison.before:
            diff = compare_sources(comparison.before, after)
            return Entry(name, "golden", "emitted", diff)
        note = "new golden"
    except UsageError:
        note = "the golden is not Python; it would be replaced as a whole"
    diff = compare_sources(after, after)
    return Entry(name, "golden", "emitted", diff, note, comparison.before)


def page(entries: Sequence[Entry], title: str = "piecework: changes of emitted source") -> str:
    """The page as text."""
    template = environment().get_template(TEMPLATE)
    return template.render(
        title=title,
        entries=[_fields(f"e{number}", entry) for number, entry in enumerate(entries)],
        several=len(entries) > 1,
        marks=_ROW_MARKS,
    )


def write_page(path: Path, entries: Sequence[Entry]) -> None:
    """Write the page to ``path``.

    Raises:
        UsageError: the file cannot be written.
    """
    try:
        snapshot.write(path, page(entries))
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UsageError(f"the page cannot be written: {reason}", where=str(path)) from error


def _fields(prefix: str, entry: Entry) -> dict[str, object]:
    diff = entry.diff
    groups = [
        {
            "title": GROUPS[group],
            "quiet": group in COSMETIC,
            "changes": [
                {
                    "status": _STATUS.get(change.kind, "changed"),
                    "mark": change.mark,
                    "function": change.function,
                    "message": visible(change.message),
                    "where": where,
                    "target": _target(prefix, change.before_line, change.after_line),
                }
                for change, where in rows
            ],
        }
        for group, rows in summary(diff)
    ]
    return {
        "id": prefix,
        "title": entry.title,
        "before": entry.before,
        "after": entry.after,
        "headline": entry.note or diff.headline,
        "note": entry.note,
        "groups": groups,
        "pieces": [] if entry.note else [*pieces_of(diff, prefix)],
        "blocks": side_by_side(entry.left if entry.note else diff.before.text, diff.after.text),
    }


def _target(prefix: str, before: int | None, after: int | None) -> str:
    if after:
        return f"{prefix}a{after}"
    return f"{prefix}b{before}" if before else ""


# --- the pieces ----------------------------------------------------------------------------------------


def pieces_of(diff: SourceDiff, prefix: str) -> Iterator[dict[str, object]]:
    """Rows of a table: what runs in the entry function before and after, runs of equal statements as one row."""
    before, after = diff.before.entry.steps, diff.after.entry.steps
    said = [
        c for c in diff.changes if c.group in ("pieces", "calls", "arguments") and not c.function
    ]
    touched = {c.before_line for c in said}, {c.after_line for c in said}
    joined = {i for join in diff.merges for i in join.parts} | {join.whole for join in diff.splits}
    joined_after = {j for join in diff.splits for j in join.parts}
    joined_after |= {join.whole for join in diff.merges}

    def status(i: int | None, j: int | None) -> str:
        if i in joined or j in joined_after:
            return "joined"
        if i is None or j is None:
            return "added" if i is None else "removed"
        changed = before[i].line in touched[0] and after[j].line in touched[1]
        return "changed" if changed else "same"

    def cell(step: Step | None, side: str) -> dict[str, object] | None:
        if step is None:
            return None
        detail = f"{len(step.arguments)} → {len(step.results)}" if step.kind == "piece" else ""
        target = f"{prefix}{side}{step.line}"
        return {"name": visible(step.callee), "detail": detail, "target": target}

    for kind, same in groupby(_rows(diff), key=lambda row: status(*row)):
        rows = [*same]
        if kind == "same" and len(rows) > 2 * _CONTEXT:
            yield {"status": "folded", "count": len(rows), "cells": ()}
            continue
        for i, j in rows:
            sides = None if i is None else before[i], None if j is None else after[j]
            cells = cell(sides[0], "b"), cell(sides[1], "a")
            yield {"status": kind, "count": 1, "cells": cells}


def _rows(diff: SourceDiff) -> Iterator[tuple[int | None, int | None]]:
    """Paired statements share a row; others have one of their own, those before first."""
    before, after = diff.before.entry.steps, diff.after.entry.steps
    i = j = 0
    for low, high in [*diff.pairs, (len(before), len(after))]:
        yield from ((k, None) for k in range(i, low))
        yield from ((None, k) for k in range(j, high))
        if low < len(before) and before[low].kind != "return":
            yield low, high
        i, j = low + 1, high + 1


# --- side by side --------------------------------------------------------------------------------------


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
    """Align two texts line by line, as safe HTML; characters that would not be seen are written as escapes."""
    texts = visible(before), visible(after)
    lines = [text.splitlines() for text in texts]
    styles = [token_styles(text) for text in texts]

    def cell(side: int, at: int | None, marks: set[int]) -> Markup:
        return Markup("") if at is None else line_html(lines[side][at], styles[side][at], marks)

    def row(kind: str, i: int | None, j: int | None) -> Row:
        marks: tuple[set[int], set[int]] = (set(), set())
        if kind == "changed" and i is not None and j is not None:
            marks = _differing(lines[0][i], lines[1][j])
        numbers = (None if at is None else at + 1 for at in (i, j))
        number, number_after = numbers
        cells = cell(0, i, marks[0]), cell(1, j, marks[1])
        return Row(kind, number, cells[0], number_after, cells[1])

    blocks: list[Block] = []
    codes = difflib.SequenceMatcher(None, *lines, autojunk=False).get_opcodes()
    for position, (tag, i1, i2, j1, j2) in enumerate(codes):
        if tag == "equal":
            rows = [row("equal", i, j) for i, j in zip(range(i1, i2), range(j1, j2), strict=True)]
            head = _CONTEXT if position else 0
            tail = _CONTEXT if position < len(codes) - 1 else 0
            if len(rows) <= head + tail + 2:
                blocks.append(Block(False, tuple(rows)))
                continue
            end = len(rows) - tail
            parts = ((False, rows[:head]), (True, rows[head:end]), (False, rows[end:]))
            blocks += [Block(folded, tuple(part)) for folded, part in parts if part]
            continue
        rows = []
        for i, j in _pair_lines(lines[0][i1:i2], lines[1][j1:j2]):
            kind = "added" if i is None else "removed" if j is None else "changed"
            rows.append(row(kind, None if i is None else i1 + i, None if j is None else j1 + j))
        blocks.append(Block(False, tuple(rows)))
    return blocks


def _pair_lines(
    before: Sequence[str], after: Sequence[str]
) -> Iterator[tuple[int | None, int | None]]:
    """Put similar lines next to each other, in order: each with the first one that is alike."""
    j = 0
    words = [{*_WORD.findall(line)} - {" "} for line in after]
    for i, line in enumerate(before):
        ours = {*_WORD.findall(line)} - {" "}
        near = range(j, min(len(after), j + 40))
        match = next((k for k in near if _ratio(ours, words[k]) > _ALIKE), None)
        if match is None:
            yield i, None
            continue
        yield from ((None, k) for k in range(j, match))
        yield i, match
        j = match + 1
    yield from ((None, k) for k in range(j, len(after)))


def _ratio(one: set[str], other: set[str]) -> float:
    return len(one & other) / len(one | other) if one | other else 1.0


def _differing(before: str, after: str) -> tuple[set[int], set[int]]:
    """Columns of the words in which two lines differ."""
    words = _WORD.findall(before), _WORD.findall(after)
    marks: tuple[set[int], set[int]] = (set(), set())
    for tag, *ends in difflib.SequenceMatcher(None, *words, autojunk=False).get_opcodes():
        for side in (0, 1):
            low, high = ends[2 * side : 2 * side + 2]
            if tag != "equal":
                start = sum(map(len, words[side][:low]))
                marks[side].update(range(start, start + sum(map(len, words[side][low:high]))))
    return marks


# --- Python in colour: a class for each kind of token; the page says what colour a class has ------------

Styles = list[str]  # for each character of a line, the class of its token
_CLASSES = (
    (Comment, "c"),
    (String, "s"),
    (Number, "n"),
    (Keyword, "k"),
    (Operator.Word, "k"),
    (Name.Builtin, "b"),
)


def token_styles(text: str) -> list[Styles]:
    """For each line, the class of each of its characters: c, s, n, k, b, v (a table) or ""."""
    styles: list[Styles] = [[""] * len(line) for line in text.splitlines()]
    line = column = 0
    for kind, value in PythonLexer(stripnl=False, ensurenl=False).get_tokens(text):
        style = _style(kind, value)
        for character in value:
            if character == "\n":
                line, column = line + 1, 0
                continue
            if line < len(styles) and column < len(styles[line]):
                styles[line][column] = style
            column += 1
    return styles


def _style(kind: _TokenType, value: str) -> str:
    if value.startswith("__vllm_"):
        return "v"
    return next((name for each, name in _CLASSES if kind in each), "")


def line_html(line: str, styles: Styles, marks: Collection[int] = ()) -> Markup:
    """``line`` with an element per run of equal styles; the columns in ``marks`` are marked."""
    parts: list[Markup] = []
    looks = [(style, at in marks) for at, style in enumerate(styles)]
    start = 0
    for column in range(1, len(line) + 1):
        if column < len(line) and looks[column] == looks[start]:
            continue
        style, marked = looks[start]
        part = escape(line[start:column])
        part = Markup('<span class="{}">{}</span>').format(style, part) if style else part
        parts.append(Markup("<mark>{}</mark>").format(part) if marked else part)
        start = column
    return Markup("").join(parts)
