"""One emitted text, whatever its kind. In: a stitching source, the source of an entry or of a replay, or text. Out: an `EmittedText` to compare.

Nothing is run; comments lose the line numbers of other files.
"""

from __future__ import annotations

import io
import re
import tokenize
from dataclasses import dataclass

import torch.fx

from piecework.codegen import LowerOptions, StitchedSource, generate_source
from piecework.codegen.entry.emit import PROVIDED, EntrySource
from piecework.codegen.replay.plan import ReplaySource
from piecework.errors import UsageError
from piecework.golden.compare.outline import outline_of
from piecework.golden.text.without_lines import without_line_numbers

STITCHED = "stitched"
_LINE = re.compile(r"(?<=\.py):\d+\b")


@dataclass(frozen=True, slots=True)
class EmittedText:
    """A text, and the names that its module holds before it is executed."""

    code: str
    provided: tuple[str, ...] = ()


def text_of(source: object, where: str) -> EmittedText:
    """The text of ``source``: what `piecework.compile` returned, one of its sources, a stitching graph, or text.

    Raises:
        UsageError: ``source`` has no emitted text; ``where`` says who asked.
    """
    match source:
        case str():
            return EmittedText(source, tuple(outline_of(source, where).bound))
        case EntrySource():
            return EmittedText(_without_lines(source.code), (*PROVIDED, *source.consts))
        case ReplaySource():
            return EmittedText(_without_lines(source.code), tuple(source.held))
        case torch.fx.GraphModule():
            source = generate_source(source, LowerOptions(line_numbers=False))
        case _:
            source = getattr(source, "source", source)
    if not isinstance(source, StitchedSource):
        raise UsageError(
            f"a {type(source).__qualname__} has no emitted source",
            where=where,
            hint="pass what piecework.compile returned, one of its sources, or text",
        )
    names = tuple(row.name for row in source.module.bound)
    return EmittedText(without_line_numbers(source), names)


def _without_lines(code: str) -> str:
    """``code`` with ``model.py`` in place of ``model.py:41`` in its comments."""
    lines = code.splitlines(keepends=True)
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            line = lines[row - 1]
            lines[row - 1] = line[:column] + _LINE.sub("", line[column:])
    return "".join(lines)
