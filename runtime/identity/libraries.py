"""What belongs to an installed library. In: a module's name, a function, a class. Out: the name that says what it is, or that it must be read.

A library's code does not change under its version, which the key holds; everything else counts by its content. It imports nothing.
"""

from __future__ import annotations

import abc
import collections.abc
import enum
import os
import sys
import sysconfig
import types
import typing
from collections.abc import Iterator
from importlib import metadata
from typing import Any

from piecework.code_objects import HEAP_TYPE

# Parts of Python whose functions depend on nothing but their arguments (and write to logs and terminals). Whatever is not here is
# read as it is, so that a function of `os` or `random` shows that it looks at something outside.
_PYTHON = frozenset(
    [
        *("__future__", "_abc", "_bisect", "_collections", "_collections_abc", "_functools"),
        *("_heapq", "_json", "_operator", "_sre", "_struct", "_thread", "_warnings"),
        *("_weakref", "_weakrefset", "abc", "array", "base64", "bisect", "builtins", "cmath"),
        *("collections", "colorsys", "contextlib", "copy", "dataclasses", "decimal", "difflib"),
        *("enum", "fractions", "functools", "graphlib", "hashlib", "heapq", "html"),
        *("itertools", "json", "keyword", "logging", "math", "numbers", "operator", "pprint"),
        *("re", "reprlib", "statistics", "string", "struct", "textwrap", "time", "token"),
        *("traceback", "types", "typing", "unicodedata", "warnings", "weakref"),
    ]
)
# Built-in functions that run text, or read what is outside of the program.
_BLIND = frozenset(
    {"__import__", "breakpoint", "compile", "eval", "exec", "globals", "input", "open"}
)
_OWN = ("piecework.codegen", "piecework.runtime", "piecework.templates", "piecework.errors")
_TORCH = ("torch", "torchgen", "functorch", "triton")
# By the list of its names: from Python 3.13 on the module itself holds the classes of iterators and generators too.
_ABSTRACT = frozenset(getattr(collections.abc, name) for name in collections.abc.__all__)
# Bases that add nothing to an instance that its attributes, or `plain_base`, would not show.
_BARE = frozenset(
    {object, abc.ABC, typing.Generic, typing.Protocol, int, float, complex, str, bytes}
    | {tuple, list, dict, set, frozenset, bytearray, enum.Enum, types.SimpleNamespace}
)


class Libraries:
    """What is installed, looked up once per reading."""

    def __init__(self) -> None:
        self._found: dict[str, str | None] = {}

    def library_of(self, module: object) -> str | None:
        """``torch 2.13.0`` for ``torch.nn``: whose module it is; None for one that counts by its content.

        Args:
            module: the module's full name.
        """
        if not isinstance(module, str):
            return None
        if module not in self._found:
            self._found[module] = _library(module)
        return self._found[module]

    def name_of(self, value: Any) -> str | None:
        """The full name of a library's function or class; None where the name does not lead to ``value`` itself."""
        module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
        library = self.library_of(module)
        if library is None or not isinstance(name, str):
            return None
        found: object = sys.modules.get(str(module))
        for part in name.split("."):
            found = getattr(found, part, None)
        fixed = isinstance(value, type) and not value.__flags__ & HEAP_TYPE
        return f"{library}: {module}.{name}" if found is value or fixed else None

    def builtin_name(self, value: Any) -> str | None:
        """The full name of a function written in C; None if it looks at something that can't be told."""
        module = value.__module__ or getattr(value.__self__, "__name__", None)
        if module in ("builtins", "_io", "io") and value.__name__ in _BLIND:
            return None
        library = self.library_of(module)
        return None if library is None else f"{library}: {module}.{value.__qualname__}"

    def keeps_all_in_attributes(self, kind: type) -> bool:
        """Whether an instance of ``kind`` is its class and its attributes: every base is written in Python and known."""
        return all(base in _BARE or self._is_python_class(base) for base in kind.__mro__) and (
            kind is not object
        )

    def _is_python_class(self, kind: type) -> bool:
        if kind.__module__.startswith(("piecework.", "collections.abc")):
            return True
        if self.library_of(kind.__module__) is not None:
            return kind in _ABSTRACT or (kind.__bases__ == (tuple,) and hasattr(kind, "_fields"))
        module = sys.modules.get(kind.__module__)
        file = getattr(module, "__file__", None)
        compiled = isinstance(file, str) and not file.endswith((".py", ".pyc"))
        known_to_python = kind.__module__.partition(".")[0] in sys.stdlib_module_names
        return bool(kind.__flags__ & HEAP_TYPE) and not compiled and not known_to_python


def _library(module: str) -> str | None:
    top = module.partition(".")[0]
    if module in _OWN or module.startswith(tuple(f"{each}." for each in _OWN)):
        return "piecework"  # its sources are in the key
    loaded = sys.modules.get(module) or sys.modules.get(top)
    file = getattr(loaded, "__file__", None)
    if top in sys.stdlib_module_names:
        shadowed = isinstance(file, str) and not _lies_in(file, ("stdlib", "platstdlib"))
        return None if shadowed or top not in _PYTHON else "python"
    if loaded is None or not (top in _TORCH or _lies_in(str(file), ("purelib", "platlib"))):
        return None
    version = _version_of(top)
    return None if version is None else f"{top} {version}"


def _lies_in(file: str, places: tuple[str, ...]) -> bool:
    paths = sysconfig.get_paths()
    real = os.path.realpath(file)
    return any(real.startswith(os.path.realpath(paths[each]) + os.sep) for each in places)


def _version_of(top: str) -> str | None:
    for name in _distributions(top):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    # A library that was put on the path without being installed.
    return str(getattr(sys.modules.get(top), "__version__", "")) or None if top in _TORCH else None


def _distributions(top: str) -> Iterator[str]:
    yield top
    yield from metadata.packages_distributions().get(top, ())
