"""Where a model holds a tensor. In: a model, and what torch calls a tensor that a trace read. Out: the look-ups on the way there, each of which can be repeated.

It reads attributes and items and changes nothing; it knows no tensor by its values.
"""

from __future__ import annotations

import abc
import ast
import operator
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

Kind = Literal["entry", "attribute", "item", "keys", "items", "members", "type", "class", "token"]
Key = tuple[Literal["attribute", "item"], object]

_TABLES = ("_parameters", "_buffers", "_modules")
NOTHING = object()


@dataclass(frozen=True, slots=True)
class Step:
    """One look-up: ``owner`` held ``value`` under ``key``.

    Attributes:
        kind: ``"entry"`` of a dictionary (an instance's attributes are one), an ``"attribute"`` that is no entry, a computed ``"item"``;
            the ``"keys"`` of a dictionary with what they hold, in order; the ``"items"`` of a list, the ``"members"`` of a set, the
            ``"type"`` of an object, what a ``"class"`` holds, or the ``"token"`` that is another whenever a class is registered with an abstract one.
        path: what errors call it.
    """

    owner: object
    key: object
    value: object
    path: str
    kind: Kind = "entry"

    @classmethod
    def of(cls, owner: object, key: object, path: str, kind: Kind = "entry") -> Step:
        """The look-up with what it finds now."""
        return cls(owner, key, _found(owner, key, kind), path, kind)

    def again(self) -> Step:
        """The look-up with what it finds now."""
        return Step.of(self.owner, self.key, self.path, self.kind)

    def now(self) -> object:
        """What is there now; a value of its own if nothing is."""
        return _found(self.owner, self.key, self.kind)

    def holds(self) -> bool:
        """Whether the same objects are still there."""
        now = self.now()
        if self.kind in _WHOLE:
            return len(now) == len(self.value) and all(map(operator.is_, now, self.value))  # type: ignore[arg-type, call-overload]
        return now == self.value if self.kind in _EQUAL else now is self.value


_WHOLE = ("keys", "items", "class")
_EQUAL = ("members", "token")


def _found(owner: Any, key: object, kind: str) -> object:
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
        case "token":
            return abc.get_cache_token()
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


def imported(alias: str) -> types.ModuleType | None:
    """The module that Dynamo calls ``__import_a_dot_b``."""
    for name, module in list(sys.modules.items()):
        if alias == f"__import_{name.replace('.', '_dot_')}":
            return module
    return None


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
            yield Step(held, key, held[key], path)
            return
        for table in _TABLES if isinstance(owner, torch.nn.Module) else ():
            values = held[table]
            if values.get(key) is not None:
                where = f"{path.rpartition('.')[0]}.{table}".lstrip(".")
                yield Step(held, key, NOTHING, path)
                yield Step(held, table, values, where)
                yield Step(values, key, values[key], path)
                return
    yield Step(owner, key, getattr(owner, str(key), NOTHING), path, "attribute")


def _item(owner: object, key: object) -> object:
    try:
        return owner[key]  # type: ignore[index]
    except (LookupError, TypeError):
        return NOTHING
