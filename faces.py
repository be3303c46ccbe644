"""Names that a package hands on from its modules, each loaded when it is first used.

They stand once, in the imports under ``if TYPE_CHECKING:``, for type checkers and this.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path

from piecework.collector import lasting


def homes(path: str) -> dict[str, str]:
    """The names that the file imports for type checkers alone, each with the module that has it."""
    return {
        each.name: str(node.module)
        for block in ast.parse(Path(path).read_text("utf-8")).body
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for each in node.names
    }


def face(
    package: str, path: str, rooms: Sequence[str] = ()
) -> tuple[list[str], Callable[[str], object], Callable[[], list[str]]]:
    """``__all__``, ``__getattr__`` and ``__dir__`` of a package and its modules in ``rooms``."""
    found = homes(path)

    def load(name: str) -> object:
        if name not in rooms and name not in found:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = f"{package}.{name}" if name in rooms else found[name]
        # Asked for each use of a name: what is there already needs no counting.
        with nullcontext() if module in sys.modules else lasting():
            loaded = import_module(module)
        return loaded if name in rooms else getattr(loaded, name)

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *found, *rooms})

    return sorted(found), load, names
