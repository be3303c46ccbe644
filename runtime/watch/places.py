"""Where something lies, what lies there now, and the look-ups on the way, which can be watched."""

from __future__ import annotations

import re
import sys
import types
import weakref
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from piecework.runtime.torch_compat import Place

StepKind = Literal["entry", "attribute", "item", "keys", "items", "members", "type", "class"]

_TABLES = ("_parameters", "_buffers", "_modules")
_WHOLE = ("keys", "items", "class")
NOTHING = object()


@dataclass(frozen=True, slots=True)
class Step:
    """One look-up: ``owner`` held ``value`` under ``key``.

    Attributes:
        kind: ``"entry"`` of a dictionary (an instance's attributes are one), an ``"attribute"`` that is no entry, a computed ``"item"``;
            the ``"keys"`` of a dictionary with what they hold, in order; the ``"items"`` of a list, the ``"members"`` of a set, the
            ``"type"`` of an object, or what a ``"class"`` holds.
        holder: the object whose attributes ``owner`` holds, if it is such a dictionary.
    """

    owner: object
    key: object
    value: object
    kind: StepKind = "entry"
    holder: object = None

    @classmethod
    def of(
        cls, owner: object, key: object, kind: StepKind = "entry", holder: object = None
    ) -> Step:
        """The look-up with what it finds now."""
        return cls(owner, key, found_at(owner, key, kind), kind, holder)

    def parts(self) -> tuple[object, ...]:
        """The objects that were found."""
        many = self.kind in _WHOLE or self.kind == "members"
        return tuple(self.value) if many else (self.value,)  # type: ignore[arg-type]

    def seen(self) -> object:
        """What was found, told by identities."""
        return seen_as(self.kind, self.value)


def seen_as(kind: str, value: Any) -> object:
    """What a look-up found, told by identities."""
    if kind == "members":
        return frozenset(map(id, value))
    return tuple(map(id, value)) if kind in _WHOLE else id(value)


def found_at(owner: Any, key: object, kind: str) -> object:
    """What a look-up finds; `NOTHING` if nothing is there."""
    match kind:
        case "entry":
            return dict.get(owner, key, NOTHING)
        case "attribute":
            return getattr(owner, str(key), NOTHING)
        case "item":
            return _item(owner, key)
        case "keys":
            if isinstance(owner, OrderedDict):
                return (*OrderedDict.keys(owner), *OrderedDict.values(owner))
            return (*dict.keys(owner), *dict.values(owner))
        case "items":
            return tuple(owner)
        case "members":
            return frozenset(owner)
        case "type":
            return type(owner)
        case _:
            return (*owner.__dict__, *owner.__dict__.values())


def _item(owner: object, key: object) -> object:
    try:
        return owner[key]  # type: ignore[index]
    except (LookupError, TypeError):
        return NOTHING


# --- places -------------------------------------------------------------------------------------------

MISSING = object()


class LookUps:
    """What lies at places now; each is looked up once.

    Args:
        starts: ``"local"`` and ``"global"`` → the variables that places start in.
    """

    def __init__(self, starts: Mapping[str, Mapping[str, object]]) -> None:
        self._starts = starts
        self._found: dict[int, object] = {}

    def at(self, place: Place) -> object:
        """The object there; `MISSING` if nothing is."""
        key = id(place)
        if key not in self._found:
            self._found[key] = self._look(place)
        return self._found[key]

    def _look(self, place: Place) -> object:
        if place.kind == "import":
            return sys.modules.get(str(place.key), MISSING)
        if place.kind == "root":
            return place.key
        if place.base is None:
            return self._starts.get(place.kind, {}).get(str(place.key), MISSING)
        base = self.at(place.base)
        return MISSING if base is MISSING else look(base, place.kind, place.key)


def look(base: Any, kind: str, key: Any) -> object:
    """What one look-up finds; `MISSING` if it fails."""
    try:
        match kind:
            case "attribute":
                return getattr(base, str(key), MISSING)
            case "item" if isinstance(base, dict):
                return dict.get(base, key, MISSING)
            case "item":
                return base[key]
            case "key":
                return list(dict.keys(base))[key]
            case "at":
                return dict.get(base, list(dict.keys(base))[key], MISSING)
            case "type":
                return type(base)
            case "class dict":
                return base.__dict__
            case "referent":
                return base() if isinstance(base, weakref.ref) else MISSING
    except (LookupError, TypeError, AttributeError, ValueError):
        pass
    return MISSING


def place_text(place: Place, names: Mapping[str, str] | None = None) -> str:
    """A place as a person would write it: ``layers.0.scale``, ``options['rate']``, ``Model.rate``.

    Args:
        names: Dynamo's names of arguments → their own.
    """
    own = (names or {}).get(place.name)
    if own is not None:
        return own
    return _place_text(place, "" if place.base is None else place_text(place.base, names))


def _place_text(place: Place, base: str) -> str:
    key = place.key
    if place.kind == "root":
        return place.name
    if place.base is None:
        if (place.kind, key) == ("local", "model"):
            return ""
        text = str(key).removeprefix("__import_").replace("_dot_", ".")
        return "builtins" if text.startswith("__builtins_dict__") else text
    match place.kind:
        case "item" if place.base.kind == "attribute" and place.base.key in _TABLES:
            return f"{base.rpartition('.')[0]}.{key}".lstrip(".")
        case "item" if place.base.kind == "class dict":
            return f"{base}.{key}"
        case "item" | "key" | "at":
            return f"{base}[{key!r}]"
        case "type":
            return f"type({base or 'model'})"
        case "class dict" | "referent":
            return base
        case "attribute" if key == "cell_contents":
            return base
        case _:
            return f"{base}.{key}".lstrip(".")


def imported(alias: str) -> types.ModuleType | None:
    """The module that Dynamo calls ``__import_a_dot_b``."""
    for name, module in list(sys.modules.items()):
        if alias == f"__import_{name.replace('.', '_dot_')}":
            return module
    return None


_PLAINER = (
    (re.compile(r"L\['model'\]\."), ""),
    (re.compile(r"L\['model'\]"), "model"),
    (re.compile(r"G\['__import_([A-Za-z0-9_]+)'\]"), lambda m: m[1].replace("_dot_", ".")),
    (re.compile(r"G\['(\w+)'\]"), r"\1"),
    (re.compile(r"(?:\b|\.)_(?:parameters|buffers|modules)\['(\w+)'\]"), r".\1"),
    (re.compile(r"(?<![\w\]])\.(?=\w)"), ""),
)


def readable(text: str, names: Mapping[str, str] | None = None) -> str:
    """Dynamo's names in a text as a person would write them: ``tables[0]`` for ``L['model'].tables[0]``.

    Args:
        names: those of arguments → their own.
    """
    for name, own in sorted((names or {}).items(), key=lambda pair: -len(pair[0])):
        text = text.replace(name, own)
    for pattern, told in _PLAINER:
        text = pattern.sub(told, text)
    return text
