"""Compiled Python code as a tree: code in it, globals it reads, what functions close over."""

from __future__ import annotations

import contextlib
import dis
import types
from collections.abc import Callable, Iterable, Iterator

#: In ``__flags__`` of classes that Python code makes, and of some of C.
HEAP_TYPE = 1 << 9


def with_inner_code(code: Iterable[types.CodeType]) -> Iterator[types.CodeType]:
    """Code objects and all code in them: inner functions, lambdas, comprehensions, classes."""
    for each in code:
        yield each
        yield from with_inner_code(c for c in each.co_consts if isinstance(c, types.CodeType))


def global_names(code: types.CodeType) -> set[str]:
    """Names that code reads from its globals, or from builtins; code in it not counted."""
    loads = ("LOAD_GLOBAL", "LOAD_NAME")
    return {str(i.argval) for i in dis.get_instructions(code) if i.opname in loads}


def cells_of(function: Callable[..., object]) -> dict[str, object]:
    """What a Python function closes over, by name; cells that are still empty are left out."""
    found: dict[str, object] = {}
    closure = getattr(function, "__closure__", None) or ()
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    for name, cell in zip(names, closure, strict=True):
        with contextlib.suppress(ValueError):
            found[name] = cell.cell_contents
    return found
