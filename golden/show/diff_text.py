"""A difference as lines for a terminal. In: a `SourceDiff`. Out: styled lines; where nothing is a terminal they come out plain.

Nothing is printed here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby

from rich.text import Text

from piecework.golden.compare.changes import COSMETIC, GROUPS, Change
from piecework.golden.compare.diff import SourceDiff
from piecework.golden.show.visible import visible

_MARK_STYLES = {"+": "bold cyan", "-": "bold yellow", "~": "bold magenta"}


def summary_lines(diff: SourceDiff) -> Iterator[Text]:
    """The semantic difference: one heading per group, one line per change."""
    yield Text(diff.headline, style="bold")
    for group, changes in diff.by_group().items():
        style = "dim" if group in COSMETIC else ""
        yield Text(f"  {GROUPS[group]}", style=f"{style} underline".strip())
        for (mark, function, message), alike in _alike(changes):
            line = Text("    ", style=style)
            line.append(mark, style=_MARK_STYLES.get(mark, "bold"))
            line.append(f" {function}: " if function else " ")
            line.append(visible(message))
            where = (
                alike[0].lines if not alike[1:] else f"{alike[0].lines} and {len(alike) - 1} more"
            )
            if alike[0].lines:
                line.append(f"  ({where})", style="dim")
            yield line


def _alike(
    changes: Iterable[Change],
) -> Iterator[tuple[tuple[str, str, str], list[Change]]]:
    """Changes that follow each other and say the same, such as one of each layer, together."""
    for key, run in groupby(changes, lambda change: (change.mark, change.function, change.message)):
        yield key, list(run)


def unified_lines(diff: SourceDiff, before: str, after: str, context: int = 3) -> Iterator[Text]:
    """The textual difference in the unified format."""
    for line in visible(diff.unified(before, after, context)).split("\n")[:-1]:
        if line.startswith(("---", "+++")):
            yield Text(line, style="bold")
        elif line.startswith("@@"):
            yield Text(line, style="dim")
        elif line.startswith("+"):
            yield Text(line, style="cyan")
        elif line.startswith("-"):
            yield Text(line, style="yellow")
        else:
            yield Text(line)
