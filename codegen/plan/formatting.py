"""Emitted text in black's format. In: Python source, or single statements. Out: the same, as black lays it out.

Black takes over a millisecond a statement, and statements repeat from layer to layer with other numbers in their names. So it is
shown each form of a statement once, with all digits zero, and the digits are put back. Nothing here knows what a text means.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING

from piecework.errors import EmitError

if TYPE_CHECKING:
    import black

LINE_LENGTH = 100

_DIGITS = re.compile("[0-9]+")
_ZEROS = str.maketrans("123456789", "000000000")

_KEPT = 10_000  # forms

#: A statement on one line, and how many blocks of its function's body are around it.
Statement = tuple[str, int]


@cache
def black_mode() -> black.Mode:
    """How black lays out. It is imported here, since those who load what was emitted need none of it."""
    import black
    from black.mode import TargetVersion

    return black.Mode(line_length=LINE_LENGTH, target_versions={TargetVersion.PY311})


def numbered(text: str) -> str:
    """``text`` with line numbers, for error messages."""
    lines = text.splitlines()
    width = len(str(len(lines)))
    return "\n".join(f"{number:>{width}} | {line}" for number, line in enumerate(lines, 1))


def format_source(text: str) -> str:
    """``text`` as black formats it; `EmitError` with numbered lines if it is not Python."""
    import black

    try:
        return black.format_str(text, mode=black_mode())
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
    found = {form: text for form in forms if (text := known.get(form)) is not None}
    new = [form for form in dict.fromkeys(forms) if form not in found]
    found |= zip(new, _format_each(new), strict=True)
    known.update({form: found[form] for form in new[: max(0, _KEPT - len(known))]})
    said = zip(statements, forms, strict=True)
    return [_with_digits(found[form], form[0], text) for (text, _), form in said]


@cache
def _laid_out() -> dict[Statement, str]:
    """What black made of forms in this process: it makes the same of them each time."""
    return {}


def _format_each(statements: Sequence[Statement]) -> Iterator[str]:
    """One call of black for all."""
    if not statements:
        return
    text = "def function():\n"
    for statement, depth in statements:
        text += "".join(f"{' ' * (4 * level)}if block:\n" for level in range(1, depth + 1))
        indent = " " * (4 * depth + 4)
        text += indent + statement.replace("\n", f"\n{indent}") + "\n"
    text = format_source(text)
    lines = text.splitlines()
    function = ast.parse(text).body[0]
    assert isinstance(function, ast.FunctionDef)
    for (_, depth), block in zip(statements, function.body, strict=True):
        for _ in range(depth):
            assert isinstance(block, ast.If)
            block = block.body[0]
        at = slice(block.lineno - 1, block.end_lineno)
        yield "\n".join(line[4 * depth + 4 :] for line in lines[at])


def _with_digits(formatted: str, form: str, text: str) -> str:
    """``formatted``, which is ``form`` laid out, with the digits of ``text``."""
    if formatted == form:
        return text
    digits = iter(_DIGITS.findall(text))
    return _DIGITS.sub(lambda _: next(digits), formatted)
