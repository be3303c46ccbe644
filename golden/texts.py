"""One emitted text, whatever its kind, to compare."""

from __future__ import annotations

import builtins
import dis
import io
import re
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import CodeType

import torch.fx

from piecework.codegen import StitchedSource, generate_source
from piecework.codegen.entry.emit import PROVIDED
from piecework.codegen.entry.source import EntrySource
from piecework.codegen.replay.plan import ReplaySource
from piecework.errors import UsageError
from piecework.golden.outline import CONSTS, outline_of

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
    if isinstance(source, torch.fx.GraphModule):
        source = generate_source(source)
    elif not isinstance(source, (str, EntrySource, ReplaySource)):
        source = getattr(source, "source", source)
    match source:
        case str():
            return EmittedText(source, tuple(outline_of(source, where).tables.bound))
        case EntrySource():
            provided: Iterable[str] = (*PROVIDED, *source.consts)
        case ReplaySource():
            provided = source.held
        case StitchedSource():
            provided = (row.name for row in source.module.bound)
        case _:
            raise UsageError(
                f"a {type(source).__qualname__} has no emitted source",
                where=where,
                hint="pass what piecework.compile returned, one of its sources, or text",
            )
    return EmittedText(_without_lines(source.code), tuple(provided))


def _without_lines(code: str) -> str:
    """``code`` with ``model.py`` in place of ``model.py:41`` in its comments."""
    lines = code.splitlines(keepends=True)
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            line = lines[row - 1]
            lines[row - 1] = line[:column] + _LINE.sub("", line[column:])
    return "".join(lines)


def undefined_names(text: EmittedText) -> list[str]:
    """Names that the module reads and nobody defines, each as ``line 4: 'x' is not defined``.

    Names that are read too early or after their deletion are for the proof that each text had.

    Raises:
        SyntaxError: the text is not Python.
    """
    module = compile(text.code, "<text>", "exec", dont_inherit=True)
    known = {*text.provided, *dir(builtins), CONSTS, "__name__"}
    known |= {each.argval for each in dis.get_instructions(module) if each.opname == "STORE_NAME"}
    return [
        f"line {line}: {name!a} is not defined"
        for line, name in _reads(module)
        if name not in known
    ]


def _reads(code: CodeType) -> Iterator[tuple[int | None, str]]:
    """Names of the module that ``code`` reads, and the functions in it."""
    for each in dis.get_instructions(code):
        if each.opname in ("LOAD_NAME", "LOAD_GLOBAL"):
            yield each.positions and each.positions.lineno, each.argval
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _reads(inner)
