"""Emitted text that does not change when unrelated code moves. In: a `StitchedSource`. Out: its text without line numbers of other files.

Only comments lose something; the statements are rendered from the same plan, and the source itself is left as it is.
"""

from __future__ import annotations

import re
from dataclasses import replace

from piecework.codegen import StitchedSource
from piecework.codegen.plan import ir
from piecework.codegen.stitch.source import render_stitched

_LINE = re.compile(r"(?<=\.py):\d+\b")


def without_line_numbers(source: StitchedSource) -> str:
    """Render ``source`` with ``model.py`` in place of ``model.py:41`` in its comments."""
    module = source.module
    return render_stitched(
        replace(
            module,
            functions=tuple(_function(function) for function in module.functions),
            entry=_function(module.entry),
        )
    )


def _function(function: ir.Function) -> ir.Function:
    return replace(function, body=tuple(_statement(stmt) for stmt in function.body))


def _statement(stmt: ir.Statement) -> ir.Statement:
    return replace(stmt, origin=replace(stmt.origin, source=_LINE.sub("", stmt.origin.source)))
