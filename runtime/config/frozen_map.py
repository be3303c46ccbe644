"""Read-only data. In: dicts and lists. Out: mappings and tuples that are hashable, comparable and stay as they are; and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from piecework.errors import ConfigError


class FrozenMap(Mapping[str, Any]):
    """A read-only mapping with string keys that can be pickled, compared and printed like a dict.

    Lists and dicts inside are frozen with it. ``to_dict()`` gives a fresh, plain, deep copy.
    """

    __slots__ = ("_items",)
    _items: dict[str, Any]

    def __init__(self, items: Mapping[str, Any] | None = None) -> None:
        object.__setattr__(
            self, "_items", {key: freeze(value) for key, value in (items or {}).items()}
        )

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __setattr__(self, name: str, value: object) -> None:
        raise ConfigError("a configuration is frozen", where=name, hint="make a changed copy")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mapping) and self._items == freeze(other)._items

    def __hash__(self) -> int:
        return hash(frozenset(self._items.items()))

    def __reduce__(self) -> tuple[type[FrozenMap], tuple[dict[str, Any]]]:
        return FrozenMap, (self._items,)

    def __repr__(self) -> str:
        return repr(self._items)

    def to_dict(self) -> dict[str, Any]:
        """A plain copy, deep: frozen maps become dicts and tuples become lists."""
        return {key: thaw(value) for key, value in self._items.items()}


def freeze(value: Any) -> Any:
    """``value`` with every dict in it turned into a FrozenMap and every list into a tuple."""
    if isinstance(value, Mapping):
        return value if isinstance(value, FrozenMap) else FrozenMap(value)
    if isinstance(value, (list, tuple)):
        return tuple(freeze(item) for item in value)
    return value


def thaw(value: Any) -> Any:
    """The inverse of :func:`freeze` for data that came from JSON: plain dicts and lists."""
    if isinstance(value, Mapping):
        return {key: thaw(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [thaw(item) for item in value]
    return value
