"""Emitted text in black's format.

Black takes over a millisecond a statement, and statements repeat from layer to layer with other numbers in their names. So it is
shown each form of a statement once, with all digits zero, and the digits are put back. Nothing here knows what a text means.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from functools import cache
from textwrap import indent
from typing import Any

from piecework.errors import EmitError

LINE_LENGTH = 100

_DIGITS = re.compile("[0-9]+")
_ZEROS = str.maketrans("123456789", "000000000")

_KEPT = 10_000  # forms

#: A statement on one line, and how many blocks of its function's body are around it.
Statement = tuple[str, int]


def numbered(text: str) -> str:
    """``text`` with line numbers, for error messages."""
    lines = text.splitlines()
    width = len(str(len(lines)))
    return "\n".join(f"{number:>{width}} | {line}" for number, line in enumerate(lines, 1))


def format_source(text: str) -> str:
    """``text`` as black formats it; `EmitError` with numbered lines if it is not Python."""
    import black  # here, since those who load what was emitted need none of it
    from black.mode import TargetVersion

    mode = black.Mode(line_length=LINE_LENGTH, target_versions={TargetVersion.PY311})
    try:
        return black.format_str(text, mode=mode)
    except ValueError as error:  # black.InvalidInput; some releases do not export it
        raise EmitError(
            f"emitted source is not Python: {error}\n{numbered(text)}",
            hint="please report this with the graph that was lowered",
        ) from error


def format_statements(statements: Sequence[Statement]) -> list[str]:
    """Each statement as black lays it out in a function's body, without its indentation.

    Black never looks at a digit: those of numbers stay as `literals` writes them, all others are letters to it.
    """
    forms = [(text.translate(_ZEROS), depth) for text, depth in statements]
    known = _laid_out()
    new = [form for form in dict.fromkeys(forms) if form not in known]
    made = dict(zip(new, _format_each(new), strict=True))
    found = {form: made[form] if form in made else known[form] for form in forms}
    known.update({form: made[form] for form in new[: max(0, _KEPT - len(known))]})
    return [
        _with_digits(found[form], form[0], text)
        for (text, _), form in zip(statements, forms, strict=True)
    ]


@cache
def _laid_out() -> dict[Statement, str]:
    """What black made of forms in this process: it makes the same of them each time."""
    return {}


def _format_each(statements: Sequence[Statement]) -> list[str]:
    """One call of black for all."""
    if not statements:
        return []
    text = "def function():\n"
    for statement, depth in statements:
        text += "".join(f"{' ' * (4 * level)}if block:\n" for level in range(1, depth + 1))
        text += indent(f"{statement}\n", " " * (4 * depth + 4))
    text = format_source(text)
    lines = text.splitlines()
    found: list[str] = []
    function: Any = ast.parse(text).body[0]
    for (_, depth), block in zip(statements, function.body, strict=True):
        for _ in range(depth):
            block = block.body[0]
        at = slice(block.lineno - 1, block.end_lineno)
        found.append("\n".join(line[4 * depth + 4 :] for line in lines[at]))
    return found


def _with_digits(formatted: str, form: str, text: str) -> str:
    """``formatted``, which is ``form`` laid out, with the digits of ``text``."""
    if formatted == form:
        return text
    digits = iter(_DIGITS.findall(text))
    return _DIGITS.sub(lambda _: next(digits), formatted)
