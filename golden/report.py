"""A page that shows differences side by side. In: `SourceDiff`s with their names. Out: one self-contained HTML file.

The page has no script, fetches nothing and follows the reader's light or dark setting; it is written in one step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from piecework.codegen.plan.render import environment
from piecework.errors import UsageError
from piecework.golden.check import CaseResult, CheckRun
from piecework.golden.compare.changes import COSMETIC, GROUPS, Change
from piecework.golden.compare.diff import SourceDiff, compare_sources
from piecework.golden.review import load
from piecework.golden.show.piece_map import piece_map
from piecework.golden.show.side_by_side import side_by_side
from piecework.golden.text import snapshot
from piecework.golden.text.snapshot import Comparison, State

TEMPLATE = "golden_report.html.jinja"

_STATUS_OF_KIND = {"added": "added", "removed": "removed", "merged": "merged", "split": "split"}


@dataclass(frozen=True, slots=True)
class Entry:
    """One pair of sources to show: its heading and the names of both sides.

    ``note`` stands in place of a comparison where the left side is none: ``left`` is its text then.
    """

    title: str
    before: str
    after: str
    diff: SourceDiff
    note: str = ""
    left: str = ""


def entries_of(run: CheckRun) -> list[Entry]:
    """An entry for each case whose golden differs, is missing, or is not Python."""
    return [_entry_of(result) for result in run.changed]


def _entry_of(result: CaseResult) -> Entry:
    assert result.comparison is not None
    return _entry(result.comparison, result.name)


def proposed(golden: Path, name: str) -> Entry:
    """An entry for a golden that has a proposal beside it."""
    return _entry(snapshot.compare(golden, load(golden).after), name)


def _entry(comparison: Comparison, name: str) -> Entry:
    note = "new golden"
    if comparison.state is State.CHANGED:
        try:
            diff = compare_sources(comparison.before, comparison.after)
            return Entry(name, "golden", "emitted", diff)
        except UsageError:
            note = "the golden is not Python; it would be replaced as a whole"
    same = compare_sources(comparison.after, comparison.after)
    return Entry(name, "golden", "emitted", same, note, comparison.before)


def page(entries: Sequence[Entry], title: str = "piecework: changes of emitted source") -> str:
    """The page as text."""
    return (
        environment()
        .get_template(TEMPLATE)
        .render(
            title=title,
            entries=[_fields(number, entry) for number, entry in enumerate(entries)],
            several=len(entries) > 1,
        )
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


def _fields(number: int, entry: Entry) -> dict[str, object]:
    prefix = f"e{number}"
    diff = entry.diff
    return {
        "id": prefix,
        "title": entry.title,
        "before": entry.before,
        "after": entry.after,
        "headline": entry.note or diff.headline,
        "note": entry.note,
        "groups": [
            {
                "title": GROUPS[group],
                "quiet": group in COSMETIC,
                "changes": [_change(change, prefix) for change in changes],
            }
            for group, changes in diff.by_group().items()
        ],
        "map": piece_map(diff, prefix),
        "blocks": side_by_side(entry.left if entry.note else diff.before.text, diff.after.text),
    }


def _change(change: Change, prefix: str) -> dict[str, object]:
    side, line = ("a", change.after_line) if change.after_line else ("b", change.before_line)
    return {
        "status": _STATUS_OF_KIND.get(change.kind, "changed"),
        "mark": change.mark,
        "kind": change.kind,
        "function": change.function,
        "message": change.message,
        "lines": change.lines,
        "target": f"{prefix}{side}{line}" if line else "",
    }
