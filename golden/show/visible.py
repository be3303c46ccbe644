"""Text that shows what it holds. In: text from a file. Out: the same with control and invisible formatting characters written as escapes.

A terminal or a page would obey such characters instead of showing them; a reviewer must see them. Everything else is left alone.
"""

from __future__ import annotations

import unicodedata

# Control, format (bidirectional overrides, zero-width) and surrogate characters, line and paragraph separators.
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


def visible(text: str) -> str:
    """``text`` with every character that is not seen as itself replaced by its escape; tabs and newlines stay."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_shown(character) for character in text)


def _shown(character: str) -> str:
    if character in "\t\n" or unicodedata.category(character) not in _HIDDEN:
        return character
    return ascii(character)[1:-1]
