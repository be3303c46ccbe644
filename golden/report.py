"""A page that shows differences side by side. In: `SourceDiff`s with their names. Out: one self-contained HTML file.

The page has no script, fetches nothing and follows the reader's light or dark setting; it is written in one step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from piecework.codegen.render import environment
from piecework.errors import UsageError
from piecework.golden import snapshot
from piecework.golden.changes import COSMETIC, GROUPS, Change
from piecework.golden.check import CheckRun
from piecework.golden.diff import SourceDiff, compare_sources
from piecework.golden.piece_map import piece_map
from piecework.golden.side_by_side import side_by_side
from piecework.golden.snapshot import State

TEMPLATE = "golden_report.html.jinja"

_STATUS_OF_KIND = {"added": "added", "removed": "removed", "merged": "merged", "split": "split"}


@dataclass(frozen=True, slots=True)
class Entry:
    """One pair of sources to show: its heading and the names of both sides."""

    title: str
    before: str
    after: str
    diff: SourceDiff


def entries_of(run: CheckRun) -> list[Entry]:
    """An entry for each case whose golden differs and can be compared; a new golden is compared with an empty function."""
    entries: list[Entry] = []
    for result in run.changed:
        comparison = result.comparison
        assert comparison is not None
        before = comparison.before if comparison.state is State.CHANGED else _EMPTY
        try:
            diff = compare_sources(before, comparison.after)
        except UsageError:  # a golden that is not Python: everything in it is replaced
            diff = compare_sources(_EMPTY, comparison.after)
        entries.append(Entry(result.case.name, "golden", "emitted", diff))
    return entries


_EMPTY = "def execution_fn(): ...\n"


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
        "headline": diff.headline,
        "groups": [
            {
                "title": GROUPS[group],
                "quiet": group in COSMETIC,
                "changes": [_change(change, prefix) for change in changes],
            }
            for group, changes in diff.by_group().items()
        ],
        "map": piece_map(diff, prefix),
        "blocks": side_by_side(diff.before.text, diff.after.text),
        "counts": _counts(diff.changes),
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


def _counts(changes: Iterable[Change]) -> int:
    return sum(change.group not in COSMETIC for change in changes)
