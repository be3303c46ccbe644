"""The Python on a page. In: a Markdown file. Out: its fenced snippets, each with what the page says that it prints."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

FENCE = re.compile(
    r"^```(\w*)[ \t]*(?:title=\"([^\"]*)\")?[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Snippet:
    """A fenced block of Python: its page and line, its title ("" without one), its text, and the text titled ``prints`` behind it, if any."""

    page: str
    line: int
    title: str
    text: str
    prints: str | None


def snippets(page: Path) -> tuple[Snippet, ...]:
    text = page.read_text("utf-8")
    blocks = list(FENCE.finditer(text))
    found = []
    for block, after in zip(blocks, [*blocks[1:], None], strict=False):
        if block[1] in ("python", "py"):
            shown = after[3] if after is not None and after[2] == "prints" else None
            line = text.count("\n", 0, block.start()) + 1
            found.append(Snippet(page.name, line, block[2] or "", block[3], shown))
    return tuple(found)
