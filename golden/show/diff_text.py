"""A difference as lines for a terminal. In: a `SourceDiff`. Out: styled lines; where nothing is a terminal they come out plain.

Nothing is printed here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator

from rich.text import Text

from piecework.golden.compare.changes import COSMETIC, GROUPS, Change
from piecework.golden.compare.diff import SourceDiff
from piecework.golden.show.visible import visible

# The number in a name (of a layer, a piece, one of several values that are called alike), and of a line. Values and shapes have none.
_NUMBER = re.compile(r"(?<=[A-Za-z])[._]\d+(?!\w*\.\d)|(?<= line )\d+")
_MANY = 4
_MARK_STYLES = {"+": "bold cyan", "-": "bold yellow", "~": "bold magenta"}


def summary_lines(diff: SourceDiff) -> Iterator[Text]:
    """The semantic difference: one heading per group, one line per change."""
    yield Text(diff.headline, style="bold")
    for group, changes in diff.by_group().items():
        style = "dim" if group in COSMETIC else ""
        yield Text(f"  {GROUPS[group]}", style=f"{style} underline".strip())
        for alike in _alike(changes):
            first = alike[0]
            line = Text("    ", style=style)
            line.append(first.mark, style=_MARK_STYLES.get(first.mark, "bold"))
            line.append(f" {first.function}: " if first.function else " ")
            line.append(visible(first.message))
            same = all(each.message == first.message for each in alike)
            more = f"{len(alike) - 1} more{'' if same else ' like it'}" if alike[1:] else ""
            where = " and ".join(filter(None, (first.lines, more)))
            if where:
                line.append(f"  ({where})", style="dim")
            yield line


def _alike(changes: Iterable[Change]) -> Iterator[list[Change]]:
    """Changes that say the same together, where the first of them is; many that differ in the numbers of names, such as one of each layer, too."""
    listed = list(changes)
    loose = [_said(change, _NUMBER.sub("", change.message)) for change in listed]
    counts = Counter(loose)
    together: dict[tuple[str, str, str], list[Change]] = {}
    for change, key in zip(listed, loose, strict=True):
        many = counts[key] >= _MANY
        together.setdefault(key if many else _said(change, change.message), []).append(change)
    yield from together.values()


def _said(change: Change, message: str) -> tuple[str, str, str]:
    return change.mark, change.function, message


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
