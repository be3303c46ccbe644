"""What lies at a place now, its text for a person, and how another process finds it."""

import functools
import re
import sys
import types
import weakref
from collections.abc import Mapping
from typing import Any, Self

from piecework.runtime.torch_compat import Place

MISSING = object()
MODEL: Place = (("local", "model"),)
#: Where a module keeps what it answers for as attributes.
TABLES = ("_parameters", "_buffers", "_modules")
#: Keys that are the same in another process.
PLAIN_KEYS = (str, int, bool, type(None))


class LookUps:
    """What lies at places now; each is looked up once."""

    def __init__(self, starts: Mapping[str, Mapping[str, object]]) -> None:
        self._starts = starts
        self._found: dict[Place, object] = {}

    @classmethod
    def of(cls, model: object) -> Self:
        """Those of places that start at the model, or an imported module."""
        return cls({"local": {"model": model}})

    def at(self, place: Place) -> Any:
        """The object there; `MISSING` if nothing is."""
        found = self._found.get(place, self)
        if found is self:
            kind, key = place[-1] if place else ("unknown", None)
            base = self.at(place[:-1]) if len(place) > 1 else self._starts
            found = self._found[place] = MISSING if base is MISSING else look_up(base, kind, key)
        return found


def look_up(base: Any, kind: str, key: Any) -> object:
    """What one step of a place leads to; `MISSING` if to nothing."""
    try:
        match kind:
            case "local" | "global":
                return base.get(kind, {}).get(key, MISSING)
            case "import":
                return sys.modules.get(key, MISSING)
            case "object":
                module, _, name = key.partition(":")
                return functools.reduce(getattr, name.split("."), sys.modules.get(module))
            case "root":
                return key[1]
            case "attribute":
                return getattr(base, str(key), MISSING)
            case "item" if isinstance(base, dict):
                return dict.get(base, key, MISSING)
            case "item":
                return base[key]
            case "key":
                return list(dict.keys(base))[key]
            case "at":
                return list(dict.values(base))[key]
            case "member":
                return list(base)[key]
            case "type":
                return type(base)
            case "class dict":
                return base.__dict__
            case "static":
                return static(base, key)
            case "referent" if isinstance(base, weakref.ref):
                return base()
    except (LookupError, TypeError, AttributeError, ValueError):
        pass
    return MISSING


def static(kind: type, name: object) -> object:
    """What a class or its bases hold under a name; `MISSING` if nothing."""
    held = (vars(each) for each in kind.__mro__)
    return next((each[name] for each in held if name in each), MISSING)  # type: ignore[index]


def is_argument(place: Place) -> bool:
    """Whether a place is in the call's arguments."""
    return place[0] in (("local", "args"), ("local", "kwargs"))


def place_text(place: Place, names: Mapping[str, str] | None = None) -> str:
    """A place as a person would write it: ``layers.0.scale``, ``options['rate']``."""
    (start, first), *steps = place
    text = "" if place[:1] == MODEL else str(first[0] if start == "root" else first)  # type: ignore[index]
    if start == "local" and steps:
        own = (names or {}).get(f"L[{first!r}][{steps[0][1]!r}]")
        text, steps = (text, steps) if own is None else (own, steps[1:])
    text = text.removeprefix("__import_").replace("_dot_", ".").rpartition(":")[2]
    for number, (kind, key) in enumerate(steps):
        before = steps[number - 1] if number else ("", None)
        if kind == "item" and before[0] == "attribute" and before[1] in TABLES:
            text = f"{text.rpartition('.')[0]}.{key}"
        elif kind in ("attribute", "static") or before[0] == "class dict":
            text = text if key == "cell_contents" else f"{text}.{key}"
        elif kind in ("item", "key", "at", "member"):
            text = f"{text}[{key!r}]"
        elif kind == "type":
            text = f"type({text or 'model'})"
    return text.lstrip(".")


_PLAINER = (
    (re.compile(r"___(?=\w)|\.? ?Guard failed on a parameter, consider using .*"), ""),
    (re.compile(r"check_type_id\((.+), \d+\), type=<class '([^']+)'>"), r"\1 == a \2"),
    (re.compile(r"L\['model'\]\."), ""),
    (re.compile(r"L\['model'\]"), "model"),
    (re.compile(r"G\['__import_([A-Za-z0-9_]+)'\]"), lambda m: m[1].replace("_dot_", ".")),
    (re.compile(r"G\['(\w+)'\]"), r"\1"),
    (re.compile(r"(?:\b|\.)_(?:parameters|buffers|modules)\['(\w+)'\]"), r".\1"),
    (re.compile(r"(?<![\w\]])\.(?=\w)"), ""),
)


def readable(text: str, names: Mapping[str, str] | None = None) -> str:
    """Dynamo's names in a text as a person would write them; ``names``: arguments' own."""
    for name, own in sorted((names or {}).items(), key=lambda pair: -len(pair[0])):
        text = text.replace(name, own)
    for pattern, told in _PLAINER:
        text = pattern.sub(told, text)
    return text


def by_attributes(place: Place) -> Place:
    """The place with what a module's tables hold as its attributes: ``linear``."""
    found: list[tuple[str, object]] = []
    for kind, key in place:
        if kind == "item" and found[-1] in [("attribute", table) for table in TABLES]:
            found[-1] = ("attribute", key)
        else:
            found.append((kind, key))
    return tuple(found)


def portable(place: Place, now: LookUps) -> Place:
    """The place as another process can look it up; () if it can't."""
    (start, _), *steps = place
    if any(kind in ("unknown", "member") or type(key) not in PLAIN_KEYS for kind, key in steps):
        return ()
    if start in ("local", "import", "object"):
        return place
    value = now.at(place[:1])
    if type(value) is dict and isinstance(value.get("__name__"), str):  # a module's variables
        module = sys.modules.get(value["__name__"])
        if getattr(module, "__dict__", None) is value:
            return (("import", value["__name__"]), ("attribute", "__dict__"), *steps)
    name: tuple[str, object] = ("import", getattr(value, "__name__", None))
    if not isinstance(value, types.ModuleType):
        parts = [getattr(value, each, None) for each in ("__module__", "__qualname__")]
        named = all(isinstance(each, str) for each in parts)
        name = ("object", ":".join(parts)) if named else ("unknown", None)
    return (name, *steps) if now.at((name,)) is value else ()
