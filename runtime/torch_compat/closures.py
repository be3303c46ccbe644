"""Closures. In: a function. Out: what it closes over."""

from __future__ import annotations

import contextlib
from collections.abc import Callable


def cells_of(function: Callable[..., object]) -> dict[str, object]:
    """What a Python function closes over, by name; cells that are still empty are left out."""
    found: dict[str, object] = {}
    closure = getattr(function, "__closure__", None) or ()
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    for name, cell in zip(names, closure, strict=True):
        with contextlib.suppress(ValueError):
            found[name] = cell.cell_contents
    return found
