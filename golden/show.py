"""Differences as a person sees them: a summary, and unified lines in colour."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator

from rich.text import Text

from piecework.errors import UsageError
from piecework.golden.diff import COSMETIC, GROUPS, Change, SourceDiff, compare_sources

# The number in a name (of a layer, a piece, one of several alike values), and of a line. Values and shapes have none.
_NUMBER = re.compile(r"(?<=[A-Za-z])[._]\d+(?!\w*\.\d)|(?<= line )\d+")
_MANY = 4
_MARK_STYLES = {"+": "bold cyan", "-": "bold yellow", "~": "bold magenta"}
_LINE_STYLES = {"---": "bold", "+++": "bold", "@@": "dim", "+": "cyan", "-": "yellow"}

# Control, format (bidirectional overrides, zero-width) and surrogate characters, line and paragraph separators.
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


def visible(text: str) -> str:
    """``text`` with every character that is not seen as itself written as an escape."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        each if each in "\t\n" or unicodedata.category(each) not in _HIDDEN else ascii(each)[1:-1]
        for each in text
    )


def difference(
    before: str, after: str, names: tuple[str, str], *, context: int = 3, text: bool = True
) -> Iterator[Text]:
    """What changed in meaning, then in ``text``."""
    try:
        diff = compare_sources(before, after)
    except UsageError:
        yield Text("the golden is not Python; it would be replaced as a whole", style="bold")
        return
    yield from summary_lines(diff)
    if text and not diff.same_text:
        yield Text("")
        yield from unified_lines(diff, *names, context)


def summary(diff: SourceDiff) -> Iterator[tuple[str, list[tuple[Change, str]]]]:
    """Each group with its changes; many alike are the first one and how many more."""
    for group, changes in diff.by_group().items():
        loose = [_key(change, _NUMBER.sub("", change.message)) for change in changes]
        counts = Counter(loose)
        alike: dict[tuple[str, ...], list[Change]] = {}
        for change, key in zip(changes, loose, strict=True):
            key = key if counts[key] >= _MANY else _key(change, change.message)
            alike.setdefault(key, []).append(change)
        rows = []
        for first, *others in alike.values():
            same = all(each.message == first.message for each in others)
            more = f"{len(others)} more{'' if same else ' like it'}" if others else ""
            rows.append((first, " and ".join(filter(None, (first.lines, more)))))
        yield group, rows


def _key(change: Change, message: str) -> tuple[str, ...]:
    return change.mark, change.function, message


def summary_lines(diff: SourceDiff) -> Iterator[Text]:
    """The difference in meaning: one heading per group, one line per change."""
    yield Text(diff.headline, style="bold")
    for group, rows in summary(diff):
        style = "dim" if group in COSMETIC else ""
        yield Text(f"  {GROUPS[group]}", style=f"{style} bold".strip())
        for change, where in rows:
            line = Text("    ", style=style)
            line.append(change.mark, style=_MARK_STYLES.get(change.mark, "bold"))
            line.append(f" {change.function}: " if change.function else " ")
            line.append(visible(change.message))
            if where:
                line.append(f"  ({where})", style="dim")
            yield line


def unified_lines(diff: SourceDiff, before: str, after: str, context: int = 3) -> Iterator[Text]:
    """The textual difference in the unified format."""
    for line in visible(diff.unified(before, after, context)).split("\n")[:-1]:
        styles = (style for start, style in _LINE_STYLES.items() if line.startswith(start))
        yield Text(line, style=next(styles, ""))
