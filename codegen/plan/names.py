"""Identifiers of the emitted module: wished-for names become unique, valid, unreserved ones."""

import builtins
import keyword
import re

SUBMODS, CONSTS = "__vllm_submods__", "__vllm_consts__"


def _is_language_builtin(name: str) -> bool:
    """Leaves out what `site`, interactive shells and `gettext` add."""
    value = getattr(builtins, name)
    if name.startswith("_") or type(value).__module__ == "_sitebuiltins":
        return False
    return (getattr(value, "__module__", None) or "builtins") in ("builtins", "_io", "io")


BUILTINS = frozenset(filter(_is_language_builtin, dir(builtins)))


def is_identifier(text: object) -> bool:
    """True when ``text`` is an ASCII identifier and not a keyword."""
    if not (isinstance(text, str) and text.isascii() and text.isidentifier()):
        return False
    # `__debug__` is a constant that no syntax may bind, not even as a keyword argument.
    return not keyword.iskeyword(text) and text != "__debug__"


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
        stem = name
        while name in self._taken:
            suffix = self._next_suffix.get(stem, 1)
            self._next_suffix[stem] = suffix + 1
            name = f"{stem}_{suffix}"
        self._taken.add(name)
        return name

    def names(self) -> frozenset[str]:
        return frozenset(self._taken)


def _sanitize(wish: str) -> str:
    name = re.sub(r"[^0-9A-Za-z_]", "_", wish)[:80]
    return name if is_identifier(name) else f"v_{name}"
