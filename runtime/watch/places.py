"""Where a model holds a tensor, as look-ups that can be repeated."""

from __future__ import annotations

import ast
import sys
import types
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from piecework.runtime.torch_compat import Place

StepKind = Literal["entry", "attribute", "item", "keys", "items", "members", "type", "class"]
Key = tuple[Literal["attribute", "item"], object]

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
        path: what errors call it.
        holder: the object whose attributes ``owner`` holds, if it is such a dictionary.
    """

    owner: object
    key: object
    value: object
    path: str
    kind: StepKind = "entry"
    holder: object = None

    @classmethod
    def of(
        cls, owner: object, key: object, path: str, kind: StepKind = "entry", holder: object = None
    ) -> Step:
        """The look-up with what it finds now."""
        return cls(owner, key, found_at(owner, key, kind), path, kind, holder)

    def again(self) -> Step:
        """The look-up with what it finds now."""
        return Step.of(self.owner, self.key, self.path, self.kind, self.holder)

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


@dataclass(frozen=True, slots=True)
class Way:
    """How to get from an object to a tensor.

    Attributes:
        start: a module, a function, or what else holds it.
        keys: attributes and items, in order.
        path: what errors call the tensor.
    """

    start: object
    keys: tuple[Key, ...]
    path: str

    def walk(self) -> list[Step]:
        """The look-ups of now; empty if they lead nowhere."""
        steps: list[Step] = []
        value = self.start
        for number, (kind, key) in enumerate(self.keys):
            rest = _text(self.keys[number + 1 :])
            steps += _steps(value, kind, key, self.path.removesuffix(rest))
            value = steps[-1].value
            if value is NOTHING:
                return []
        return steps

    def tensor(self) -> object:
        """What is at the end of the way now; None if it leads nowhere."""
        steps = self.walk()
        return steps[-1].value if steps else None


def named(root: torch.nn.Module, path: str, prefix: str) -> Way:
    """The way to a parameter or buffer by its dotted name."""
    keys: tuple[Key, ...] = tuple(("attribute", name) for name in path.split("."))
    return Way(root, keys, f"{prefix}{path}")


def traced(source: str, model: object) -> Way | None:
    """The way that Dynamo's name of a tensor describes, such as ``L['model'].tables[0]``; None for what is no plain look-up."""
    found = parsed(source)
    if found is None:
        return None
    root, keys = found
    (_, first), rest = keys[0], _without_tables(keys[1:])
    if (root, first) == ("L", "model"):
        return Way(model, rest, _text(rest).lstrip("."))
    module = imported(str(first)) if root == "G" else None
    return None if module is None else Way(module, rest, module.__name__ + _text(rest))


def parsed(source: str) -> tuple[str, list[Key]] | None:
    """Dynamo's name of a value as the dictionary that it starts in (``L`` or ``G``) and the look-ups from there."""
    keys: list[Key] = []
    try:
        node: ast.expr = ast.parse(source, mode="eval").body
    except SyntaxError:
        return None
    while not isinstance(node, ast.Name):
        if isinstance(node, ast.Attribute):
            keys.insert(0, ("attribute", node.attr))
        elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            keys.insert(0, ("item", node.slice.value))
        else:
            return None
        node = node.value
    return (node.id, keys) if keys else None


def readable(source: str) -> str:
    """Dynamo's name of a tensor as a person would write it: ``tables[0]`` for ``L['model'].tables[0]``."""
    way = traced(source, None)
    return source if way is None else way.path


def _without_tables(keys: Sequence[Key]) -> tuple[Key, ...]:
    """``_parameters['weight']`` is the attribute ``weight``."""
    found: list[Key] = []
    for kind, key in keys:
        if kind == "item" and found and found[-1] in [("attribute", name) for name in _TABLES]:
            found[-1] = ("attribute", key)
        else:
            found.append((kind, key))
    return tuple(found)


def _text(keys: Sequence[Key]) -> str:
    return "".join(f".{key}" if kind == "attribute" else f"[{key!r}]" for kind, key in keys)


def _steps(owner: object, kind: str, key: object, path: str) -> Iterator[Step]:
    """The look-ups that ``owner.key`` or ``owner[key]`` is made of."""
    if kind == "item":
        entry = type(owner) is dict and key in owner
        yield Step(owner, key, _item(owner, key), path, "entry" if entry else "item")
        return
    held = getattr(owner, "__dict__", None)
    computed = hasattr(getattr(type(owner), str(key), None), "__set__")  # a property, a slot
    if type(held) is dict and not computed:
        if key in held:
            yield Step(held, key, held[key], path, holder=owner)
            return
        for table in _TABLES if isinstance(owner, torch.nn.Module) else ():
            values = held[table]
            if values.get(key) is not None:
                where = f"{path.rpartition('.')[0]}.{table}".lstrip(".")
                yield Step(held, key, NOTHING, path, holder=owner)
                yield Step(held, table, values, where, holder=owner)
                yield Step(values, key, values[key], path)
                return
    yield Step(owner, key, getattr(owner, str(key), NOTHING), path, "attribute")


def _item(owner: object, key: object) -> object:
    try:
        return owner[key]  # type: ignore[index]
    except (LookupError, TypeError):
        return NOTHING


# --- places of guards ---------------------------------------------------------------------------------

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
