"""What a piece of Python does, as data that can be hashed: in, a function, class or object; out, digests of its source and state.

It never uses an address or a path, and it never guesses: an object without a stable form is an error.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import inspect
import json
import types
from collections.abc import Iterator, Mapping
from typing import Any

from piecework.errors import ConfigError


def canonical(value: Any, where: str) -> Any:
    """``value`` as plain JSON data that is equal wherever and whenever the value is.

    Data stands for itself, sets are sorted, enum members are their names. A callable counts by its
    ``uuid()`` if it has one, else by its source, its defaults, what it closes over, and the
    functions and constants of its own module that it uses.

    Args:
        value: data, a callable, or an object with ``uuid()``.
        where: the field it comes from, for the error.

    Raises:
        ConfigError: the value, or something in it, has no stable form.
    """
    return _Reader(where).read(value)


def text_of(value: Any) -> str:
    """Plain JSON data as one text, whatever the order of its keys."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


# Types of torch whose text says all; by name, so that torch is not imported for them.
_TORCH = ("OpOverload", "OpOverloadPacket", "dtype", "device", "layout", "memory_format")


class _Reader:
    """One reading; it remembers the functions it has entered, which may call each other."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.entered: dict[types.FunctionType, str] = {}

    def read(self, value: Any) -> Any:
        match value:
            case enum.Enum():
                return value.name
            case None | bool() | str() | int() | float():
                return value
            case tuple() | list():
                return [self.read(item) for item in value]
            case set() | frozenset():
                return {"set": sorted(text_of(self.read(item)) for item in value)}
            case Mapping():
                return {str(key): self.read(item) for key, item in value.items()}
            case _:
                return self._code(value)

    def _code(self, value: Any) -> Any:
        uuid = getattr(value, "uuid", None)
        if callable(uuid) and not isinstance(value, type):
            return {"uuid": self.read(uuid())}
        match value:
            case functools.partial():
                return {"partial": self.read([value.func, value.args, value.keywords])}
            case types.MethodType():
                return {"method": self.read([value.__func__, vars(value.__self__)])}
            case types.FunctionType():
                return self._function(value)
            case types.BuiltinFunctionType():
                return {"builtin": f"{value.__module__}.{value.__qualname__}"}
            case type():
                return {"source": self._source(value)}
        if type(value).__module__ in ("torch", "torch._ops") and type(value).__name__ in _TORCH:
            return {"torch": str(value)}
        raise ConfigError(
            f"an object of {type(value).__qualname__} has no stable form, so it can't be part of the "
            "cache key",
            where=self.where,
            hint="give it a method uuid() that returns a string, or name a function",
        )

    def _function(self, function: types.FunctionType) -> Any:
        if function in self.entered:
            return {"seen": self.entered[function]}
        self.entered[function] = function.__qualname__
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        return {
            "source": self._source(function),
            "defaults": self.read([function.__defaults__, function.__kwdefaults__]),
            "closure": {name: self.read(_content(cell)) for name, cell in cells},
            "uses": dict(self._globals(function)),
        }

    def _globals(self, function: types.FunctionType) -> Iterator[tuple[str, Any]]:
        """Functions of the same module and constants that ``function`` reads by name.

        Imported modules count by their versions elsewhere; loggers and the like do not count.
        """
        for name in sorted(_names_in(function.__code__)):
            value = function.__globals__.get(name)
            own = isinstance(value, (types.FunctionType, type))
            if (own and value.__module__ == function.__module__) or isinstance(
                value, (bool, int, float, str, enum.Enum)
            ):
                yield name, self.read(value)

    def _source(self, value: Any) -> str:
        try:
            source = inspect.getsource(value)
        except (OSError, TypeError):
            raise ConfigError(
                f"the source of {value.__qualname__} can't be read, so it can't be part of the cache key",
                where=self.where,
                hint="define it in a file, or give it a method uuid()",
            ) from None
        return hashlib.sha256(source.encode()).hexdigest()


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # the enclosing function has not assigned it
        return None


def _names_in(code: types.CodeType) -> set[str]:
    """Global names that a function's code mentions, its inner functions included."""
    inner = (each for each in code.co_consts if isinstance(each, types.CodeType))
    return set(code.co_names).union(*map(_names_in, inner))
