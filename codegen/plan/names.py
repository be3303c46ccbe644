"""Identifiers of the emitted module. In: wished-for names from a graph, hostile or not. Out: unique, valid, unreserved ones.

A name table never gives out a keyword, a builtin, an import, an alias or anything that starts with ``__vllm_``.
"""

from __future__ import annotations

import builtins
import keyword
import re


def _is_language_builtin(name: str) -> bool:
    """Leaves out what `site`, interactive shells and `gettext` add, so that names don't depend on how Python was started."""
    value = getattr(builtins, name)
    if name.startswith("_") or type(value).__module__ == "_sitebuiltins":
        return False
    return (getattr(value, "__module__", None) or "builtins") in ("builtins", "_io", "io")


SUBMODS, CONSTS = "__vllm_submods__", "__vllm_consts__"
BUILTINS = frozenset(name for name in dir(builtins) if _is_language_builtin(name))
_NOT_IDENTIFIER = re.compile(r"[^0-9A-Za-z_]")


def is_identifier(text: object) -> bool:
    """True when ``text`` is an ASCII identifier and not a keyword, so that it means itself in source."""
    return (
        isinstance(text, str)
        and text.isascii()
        and text.isidentifier()
        and not keyword.iskeyword(text)
        and text
        != "__debug__"  # a constant that no syntax may bind, not even as a keyword argument
    )


class NameTable:
    """Gives out names for one scope; names of the enclosing module are reserved in it."""

    def __init__(
        self, reserved: frozenset[str] = frozenset(), builtins: frozenset[str] = BUILTINS
    ) -> None:
        self._taken = set(reserved) | builtins
        self._next_suffix: dict[str, int] = {}

    def reserve(self, name: str) -> None:
        """Never give out ``name`` from now on."""
        self._taken.add(name)

    def claim(self, wish: str) -> str:
        """Return ``wish`` if it can be used as it is, else the nearest free name."""
        name = wish if is_identifier(wish) else _sanitize(wish)
        if name.startswith("__") or not name.strip("_"):  # "_" would become "__1" when it is taken
            name = name.lstrip("_") or "value"
            name = name if is_identifier(name) else f"v_{name}"
        if name in self._taken:
            stem = name
            suffix = self._next_suffix.get(stem, 1)
            while f"{stem}_{suffix}" in self._taken:
                suffix += 1
            self._next_suffix[stem] = suffix + 1
            name = f"{stem}_{suffix}"
        self._taken.add(name)
        return name

    def names(self) -> frozenset[str]:
        return frozenset(self._taken)


def _sanitize(wish: str) -> str:
    name = _NOT_IDENTIFIER.sub("_", wish)[:80]
    if not name or name[0].isdigit() or not name.isidentifier() or keyword.iskeyword(name):
        name = f"v_{name}"
    return name
