"""The identity of Python values. In: data, a function, a class, an object, an operator. Out: plain JSON data that is equal exactly where they are.

It never uses an address or a path, never compares by ``==``, and never guesses: what is not on the list of kinds that it knows is an error.

Each value is written with its exact type, so that no two kinds meet: ``True``, ``1``, ``1.0`` and ``"1"``; a tuple, a list and a set; an
enum's member and an equal string. A mutable value that comes twice is written once and referred to by its number. Code counts by its
compiled form (instructions, constants, names) and by everything that it reaches by name, see `piecework.runtime.identity.code`.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
import types
from collections.abc import Callable, Iterable
from typing import Any

from piecework.errors import Unidentifiable
from piecework.runtime.identity.kinds import KINDS, plain_base
from piecework.runtime.identity.libraries import Libraries

_MAX_VALUES = 200_000


def canonical(value: Any, where: str) -> Any:
    """``value`` as plain JSON data: equal for equal content in any process, different for any other type or content.

    Args:
        value: data, a callable, a class, an operator, an object made of these, or one with a method ``uuid()``, which
            then speaks for it.
        where: the field it comes from, for the error.

    Raises:
        Unidentifiable: the value, or something in it, has no stable form: a tensor, a lock, an open file, code that reads
            what this can't see (``eval``, the environment, a module as a value).

    Example:
        >>> canonical((1, True, 1.0, "1"), "x")
        [1, True, 1.0, '1']
    """
    try:
        return Reader(where).read(value)
    except RecursionError:
        raise Unidentifiable(
            "it is nested too deeply to have a stable form", where=where, hint=Reader.HINT
        ) from None


def text_of(value: Any) -> str:
    """Plain JSON data as one text, whatever the order of its keys."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def digest_of(value: Any, where: str) -> str:
    """SHA-256 of `canonical`; raises as it does."""
    return hashlib.sha256(text_of(canonical(value, where)).encode()).hexdigest()


class Reader:
    """One reading of one value; it numbers the mutable values that it has met, which may hold each other."""

    HINT = "give it a method uuid() that returns a string"

    def __init__(self, where: str, libraries: Libraries | None = None) -> None:
        self.where = where
        self.libraries = libraries or Libraries()
        self._numbers: dict[int, int] = {}
        self._alive: list[object] = []  # so that no address is used twice while this reads
        self._read = 0

    def read(self, value: Any) -> Any:
        """``value`` as plain JSON data; a JSON object always has one key, which says what it stands for.

        Raises:
            Unidentifiable: as `canonical`.
        """
        self._read += 1
        if self._read > _MAX_VALUES:
            raise self.unknown("it reaches too much to have a stable form")
        kind = type(value)
        if value is None or kind is bool:
            return value
        if kind in _PLAIN:
            return _PLAIN[kind](value)
        if kind is tuple:
            return [self.read(item) for item in value]
        for known, read in KINDS:
            if known(value):
                return read(self, value)
        return self._object(value)

    def once(self, value: object, tag: str, content: Callable[[], Any]) -> Any:
        """``{tag: content()}`` where ``value`` is met first, its number after that."""
        known = self._numbers.get(id(value))
        if known is not None:
            return {"seen": known}
        self._numbers[id(value)] = len(self._numbers)
        self._alive.append(value)
        return {tag: content()}

    def unordered(self, values: Iterable[object]) -> list[Any]:
        """Items of a set, in the order of what they are and not of their hashes."""
        alone = [
            (text_of(Reader(self.where, self.libraries).read(value)), value) for value in values
        ]
        return [self.read(value) for _, value in sorted(alone, key=lambda pair: pair[0])]

    def pairs(self, items: Iterable[tuple[object, object]]) -> list[Any]:
        """Keys and values, in their order."""
        return [[self.read(key), self.read(value)] for key, value in items]

    def unknown(self, why: str, hint: str = HINT) -> Unidentifiable:
        return Unidentifiable(
            f"{why}, so it can't be part of the cache key", where=self.where, hint=hint
        )

    # --- objects -----------------------------------------------------------------------------------

    def _object(self, value: object) -> Any:
        """An instance of a class written in Python: the class, what a built-in base holds, and every attribute."""
        kind = type(value)
        # Looked up in the classes: an object that answers for every name does not speak for itself.
        if any(callable(vars(base).get("uuid")) for base in kind.__mro__):
            own = self._own_uuid(value, value.uuid)  # type: ignore[attr-defined]
            return {"uuid": [kind.__module__, kind.__qualname__, own]}
        if not self.libraries.keeps_all_in_attributes(kind):
            raise self.unknown(f"an object of {kind.__qualname__} has no stable form")

        def content() -> list[Any]:
            base = plain_base(self, value)
            return [self.read(kind), base, self.pairs(attributes_of(value))]

        return self.once(value, "object", content)

    def _own_uuid(self, value: object, uuid: Callable[[], object]) -> Any:
        found = uuid()
        if found is None:
            raise self.unknown(f"uuid() of a {type(value).__qualname__} returned None")
        return self.read(found)


def attributes_of(value: object) -> list[tuple[str, object]]:
    """What an instance holds: its slots, from the base class on, then its ``__dict__``, in order."""
    found: list[tuple[str, object]] = []
    for kind in reversed(type(value).__mro__):
        for name, slot in vars(kind).items():
            if isinstance(slot, types.MemberDescriptorType):
                try:
                    found.append((f"{kind.__qualname__}.{name}", slot.__get__(value)))
                except AttributeError:
                    continue  # it was never set
    return found + list(getattr(value, "__dict__", {}).items())


def _float(value: float) -> Any:
    return value if math.isfinite(value) else {"float": struct.pack(">d", value).hex()}


def _int(value: int) -> Any:
    return value if -(2**63) <= value < 2**63 else {"int": hex(value)}


def _str(value: str) -> Any:
    try:
        value.encode()
    except (
        UnicodeEncodeError
    ):  # lone surrogates: JSON would write two of them as the character that they spell
        return {"str": value.encode("utf-32-be", "surrogatepass").hex()}
    return value


_PLAIN: dict[type, Callable[[Any], Any]] = {
    float: _float,
    int: _int,
    str: _str,
    complex: lambda value: {"complex": [_float(value.real), _float(value.imag)]},
    bytes: lambda value: {"bytes": value.hex()},
    type(...): lambda value: {"constant": "..."},
    type(NotImplemented): lambda value: {"constant": "NotImplemented"},
    range: lambda value: {"range": [_int(value.start), _int(value.stop), _int(value.step)]},
}
