"""What pieces call, read from a printed graph. In: the text that a compilation left beside its source. Out: calls by piece, and what differs, in words.

The text is parsed, never executed. A class for each submodule is all that is looked for; a text that has none says nothing.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator, Mapping

Calls = Mapping[str, Counter[str]]


def calls_by_piece(text: str) -> dict[str, Counter[str]]:
    """Submodule → how often each function is called in it; {} for a text that is not Python.

    A method is ``.name``; an operator is ``add`` or ``mult``.
    """
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return {}
    classes = (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    return {node.name: Counter(_calls(node)) for node in classes}


def _calls(piece: ast.ClassDef) -> Iterator[str]:
    forward = (stmt for stmt in piece.body if isinstance(stmt, ast.FunctionDef))
    for function in forward:
        for stmt in function.body:
            for node in ast.walk(stmt):
                match node:
                    case ast.Call(func=ast.Attribute(attr=name)) if not _is_path(node.func):
                        yield f".{name}"
                    case ast.Call(func=func):
                        yield ast.unparse(func)
                    case ast.BinOp(op=sign):
                        yield type(sign).__name__.lower()


def _is_path(function: ast.expr) -> bool:
    """True for ``torch.relu``, and not for a method of a value."""
    while isinstance(function, ast.Attribute):
        function = function.value
    return isinstance(function, ast.Name) and function.id in ("torch", "operator", "math")


def difference(before: Counter[str], after: Counter[str]) -> str:
    """``gelu in place of silu``; "" where both call the same."""
    gone, new = before - after, after - before
    was, now = (", ".join(_counted(calls)) for calls in (gone, new))
    if was and now:
        return f"{now} in place of {was}"
    return f"{now} more" if now else f"{was} less" if was else ""


def _counted(calls: Counter[str]) -> Iterator[str]:
    for name, count in calls.items():
        yield name if count == 1 else f"{count} {name}"
