"""One self-contained page that shows differences.

The page has no script, fetches nothing and follows the reader's light or dark setting.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, zip_longest
from pathlib import Path

from markupsafe import Markup, escape
from pygments import highlight
from pygments.formatters.html import HtmlFormatter
from pygments.lexers.python import PythonLexer

from piecework.codegen.plan.render import filled
from piecework.errors import UsageError
from piecework.golden import snapshot
from piecework.golden.diff import COSMETIC, GROUPS, MARKS, SourceDiff, compare_sources
from piecework.golden.outline import Step
from piecework.golden.review import summary, visible
from piecework.golden.snapshot import Comparison

TEMPLATE = "golden_report.html.jinja"

_WORD = re.compile(r"\d+\.\d+|\w+|\s+|[^\w\s]")
_CONTEXT = 3


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
    return filled(
        TEMPLATE,
        title=title,
        entries=[_fields(f"e{number}", entry) for number, entry in enumerate(entries)],
        several=len(entries) > 1,
        marks=MARKS,
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
                    "status": change.kind,
                    "mark": change.mark,
                    "function": change.function,
                    "message": visible(change.message),
                    "where": where,
                    "target": (
                        f"{prefix}a{change.after_line}"
                        if change.after_line
                        else f"{prefix}b{change.before_line}" if change.before_line else ""
                    ),
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


def pieces_of(diff: SourceDiff, prefix: str) -> Iterator[dict[str, object]]:
    """Rows of a table: what runs before and after, many equal statements as one row."""
    before, after = diff.before.entry.steps, diff.after.entry.steps
    groups = ("pieces", "calls", "arguments")
    said = [each for each in diff.changes if each.group in groups and not each.function]
    touched = {(each.before_line, each.after_line) for each in said}

    def status(row: tuple[Step | None, Step | None]) -> str:
        old, new = row
        if old is None or new is None:
            return "added" if old is None else "removed"
        return "changed" if (old.line, new.line) in touched else "same"

    def cell(step: Step | None, side: str) -> dict[str, object] | None:
        if step is None:
            return None
        detail = f"{len(step.operands)} → {len(step.results)}" if step.kind == "piece" else ""
        name = visible(step.callee or step.text)
        return {"name": name, "detail": detail, "target": f"{prefix}{side}{step.line}"}

    rows: list[tuple[Step | None, Step | None]] = []
    i = j = 0
    for low, high in [*diff.pairs, (len(before), len(after))]:
        rows += [(step, None) for step in before[i:low]] + [(None, step) for step in after[j:high]]
        rows += [*zip(before[low : low + 1], after[high : high + 1], strict=True)]
        i, j = low + 1, high + 1
    rows = [row for row in rows if any(step and step.kind != "return" for step in row)]
    for kind, same in groupby(rows, key=status):
        found = [*same]
        if kind == "same" and len(found) > 2 * _CONTEXT:
            yield {"status": "folded", "count": len(found), "cells": ()}
            continue
        for old, new in found:
            yield {"status": kind, "count": 1, "cells": (cell(old, "b"), cell(new, "a"))}


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
    """Align two texts line by line, as safe HTML."""
    lines = [visible(text).splitlines() for text in (before, after)]
    coloured = [_in_colour(each) for each in lines]

    def row(i: int | None, j: int | None) -> Row:
        if i is None or j is None:
            kind = "added" if i is None else "removed"
            cells = [
                Markup() if at is None else html[at]
                for html, at in zip(coloured, (i, j), strict=True)
            ]
        elif lines[0][i] == lines[1][j]:
            kind, cells = "equal", [coloured[0][i], coloured[1][j]]
        else:
            kind, cells = "changed", _marked(lines[0][i], lines[1][j])
        numbers = [None if at is None else at + 1 for at in (i, j)]
        return Row(kind, numbers[0], cells[0], numbers[1], cells[1])

    blocks: list[Block] = []
    codes = difflib.SequenceMatcher(None, *lines, autojunk=False).get_opcodes()
    for position, (tag, i1, i2, j1, j2) in enumerate(codes):
        rows = [row(i, j) for i, j in zip_longest(range(i1, i2), range(j1, j2))]
        head = _CONTEXT if position else 0
        end = len(rows) - (_CONTEXT if position < len(codes) - 1 else 0)
        if tag != "equal" or end <= head + 2:
            head = end = len(rows)
        parts = ((False, rows[:head]), (True, rows[head:end]), (False, rows[end:]))
        blocks += [Block(folded, tuple(part)) for folded, part in parts if part]
    return blocks


def _in_colour(lines: Sequence[str]) -> list[Markup]:
    """Python in colour: an element with a class of Pygments for each kind of token."""
    lexer = PythonLexer(stripnl=False, ensurenl=False)
    html = highlight("\n".join(lines), lexer, HtmlFormatter(nowrap=True))
    return [Markup(line) for line in html.split("\n")]


def _marked(*lines: str) -> list[Markup]:
    """Two lines with those words marked in which they differ."""
    words = [_WORD.findall(line) for line in lines]
    parts: tuple[list[Markup], list[Markup]] = ([], [])
    for tag, *ends in difflib.SequenceMatcher(None, *words, autojunk=False).get_opcodes():
        for side in (0, 1):
            text = escape("".join(words[side][slice(*ends[2 * side : 2 * side + 2])]))
            mark = Markup("{}" if tag == "equal" else "<mark>{}</mark>")
            parts[side].append(mark.format(text) if text else text)
    return [Markup().join(each) for each in parts]
