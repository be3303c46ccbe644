"""Whether look-ups lead to the same objects: told in microseconds while nothing is written.

CPython numbers the writes to each dictionary, and torch compares these numbers in one call; only
after a write are the entries looked at. Where torch can't, every test looks at every entry.
"""

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any, Literal, Self

import torch

from piecework.code_objects import HEAP_TYPE
from piecework.runtime import torch_compat
from piecework.runtime.watch.places import look_up, static

QUIET = 8  # tests without a write, after which the numbers are trusted, for milliseconds once
_EQUAL = (bool, int, str, bytes)
_NOTHING = object()
LookKind = Literal["entry", "attribute", "static", "item", "keys", "contents", "type", "hooks"]


@dataclass(frozen=True, slots=True)
class Look:
    """One look-up: ``owner`` held ``value`` under ``key``."""

    owner: Any
    key: Any
    value: Any
    # An entry of a dictionary, an attribute that is none, what a class and its bases hold, a computed
    # item; all keys of a dictionary, a list's or set's contents, an object's type; or an empty table
    # of hooks: torch counts each hook that is registered, so that tables need no test of their own.
    kind: LookKind

    @classmethod
    def of(cls, owner: Any, key: object, kind: LookKind) -> Self:
        """The look-up with what it finds now."""
        return cls(owner, key, _found(owner, key, kind), kind)

    def holds(self) -> bool:
        """Whether it finds the same; of plain values an equal one will do."""
        now, was = _found(self.owner, self.key, self.kind), self.value
        if self.kind in ("keys", "contents", "hooks"):
            return len(now) == len(was) and all(map(operator.is_, now, was))
        return now is was or (type(now) in _EQUAL and type(now) is type(was) and now == was)

    def watched(self) -> list[dict[Any, Any]]:
        """The dictionaries whose writes tell of a change; none if none do."""
        if self.kind == "hooks":
            return [torch_compat.class_dict(torch.utils.hooks.RemovableHandle)]
        if self.kind == "static":
            kinds = (each for each in self.owner.__mro__ if each.__flags__ & HEAP_TYPE)
            return list(map(torch_compat.class_dict, kinds))
        return [self.owner] if self.kind in ("entry", "keys") else []

    def __str__(self) -> str:
        name = getattr(self.owner, "__qualname__", None)
        return f"{name}.{self.key}" if name else "torch.nn.modules.module's hooks"


def _found(owner: Any, key: Any, kind: LookKind) -> Any:
    match kind:
        case "entry":
            return dict.get(owner, key, _NOTHING)
        case "attribute":
            return getattr(owner, key, _NOTHING)
        case "item":
            return look_up(owner, kind, key)
        case "keys":
            return (*dict.keys(owner), *dict.values(owner))
        case "static":
            return static(owner, key)
        case "type":
            return type(owner)
    return tuple(owner)


class DictWatch:
    """A test of many look-ups: where `untouched` is False, ask `compare`."""

    def __init__(self, looks: Iterable[Look]) -> None:
        self._looks = list(looks)
        watched = [look.watched() for look in self._looks]
        self._dicts = list({id(each): each for dicts in watched for each in dicts}.values())
        pairs = zip(self._looks, watched, strict=True)
        self._others = [look for look, dicts in pairs if not dicts]
        self._numbers, self._quiet = torch_compat.dict_versions(self._dicts), 0
        self._quick = _quick_test(self._looks)
        self.untouched: Callable[[], bool] = self._trust()

    def compare(self) -> bool:
        """Look at every entry."""
        self.untouched = _unknown
        if not self._quick():
            if not all(look.holds() for look in self._looks):
                return False
            self._quick = _quick_test(self._looks)  # some are equal, and other objects
        before, self._numbers = self._numbers, torch_compat.dict_versions(self._dicts)
        self._quiet = self._quiet + 1 if self._numbers == before else 0
        if self._quiet >= QUIET:
            self.untouched = self._trust()
        return True

    def _trust(self) -> Callable[[], bool]:
        """The cheap test, from the state of now."""
        ready = torch_compat.guards_ready()
        unwritten = torch_compat.dict_guard(self._dicts) if ready else self._unchanged
        if self._numbers is None or unwritten is None:
            return _unknown
        test = _quick_test(self._others, unwritten)
        # Another thread may write while the test is made.
        return test if self._quick() else _unknown

    def _unchanged(self) -> bool:
        """Whether no number is another, for the time until torch's guards are imported."""
        self._quiet += 1
        if self._quiet > QUIET:  # the first calls of a process are not slowed down by it
            torch_compat.import_guards()
        if torch_compat.guards_ready():
            self.untouched = self._trust()
        return torch_compat.dict_versions(self._dicts) == self._numbers


def _quick_test(
    looks: Sequence[Look], unwritten: Callable[[], bool] = lambda: True
) -> Callable[[], bool]:
    """Whether look-ups lead to the very objects of now, and dictionaries are unwritten."""
    kinds = {kind: [e for e in looks if e.kind == kind] for kind in ("type", "attribute", "entry")}
    others = [each for each in looks if each.kind not in kinds]
    owners, keys, values = (
        {kind: [part(e) for e in found] for kind, found in kinds.items()}
        for part in (lambda e: e.owner, lambda e: e.key, lambda e: _found(e.owner, e.key, e.kind))
    )
    is_, types = operator.is_, owners["type"]

    def holds() -> bool:
        if not unwritten():
            return False
        entries = map(dict.get, owners["entry"], keys["entry"], repeat(_NOTHING))
        attributes = map(getattr, owners["attribute"], keys["attribute"], repeat(_NOTHING))
        return (
            list(map(type, types)) == values["type"]
            and all(map(is_, attributes, values["attribute"]))
            and all(map(is_, entries, values["entry"]))
            and (not others or all(look.holds() for look in others))
        )

    return holds


def _unknown() -> bool:
    return False
