"""Whether look-ups still lead to the same objects: a test that costs a few microseconds while nothing is written.

Nothing is put into anybody's objects. CPython numbers the writes to each dictionary, and torch can compare these numbers, the classes of objects and what their
attributes are in calls into C (Dynamo's guards do); only after a write are the entries themselves looked at. Where torch can't, every test looks at every entry.

Objects are held weakly. Once one of them is gone the watch forgets everything, so that what it held in dictionaries and lists can go too, and every test fails.
"""

from __future__ import annotations

import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from piecework.runtime import torch_compat
from piecework.runtime.watch.places import NOTHING, Step, found_at, seen_as

QUIET = 8  # tests without a write, after which the numbers are trusted again: trusting costs milliseconds once
BUSY = (
    8  # tests that found a dictionary written, after which its entries are looked at in every test
)
_PLAIN = (dict, OrderedDict)
_EQUAL = (bool, int, str, bytes)
_NOT_PLAIN = type("NotPlain", (), {})()


@dataclass(frozen=True, slots=True)
class _Look:
    """A look-up whose result is told by identity.

    Attributes:
        owner: gives the object that is looked into; None if it is gone.
    """

    owner: Callable[[], object]
    key: object
    kind: str
    seen: object

    def holds(self) -> bool:
        owner = self.owner()
        return (
            owner is not None
            and seen_as(self.kind, found_at(owner, self.key, self.kind)) == self.seen
        )


class DictWatch:
    """A test of many look-ups.

    Args:
        steps: what was found where.

    Attributes:
        untouched: True if nothing was written; False says only that something may have been: then call `compare`.
    """

    def __init__(self, steps: Sequence[Step]) -> None:
        self._held = _Held(self)
        owners = {id(step.owner): step.owner for step in steps if _is_dictionary(step)}
        self._dicts = list(owners.values())
        rows = [step for step in steps if _is_dictionary(step)]
        looks = [step for step in steps if not _is_dictionary(step)]
        for step in steps:
            self._held.add(step.holder, *step.parts())
        self._held.add(*(step.owner for step in looks))
        attributes = [s for s in looks if s.kind == "attribute" and s.value is not NOTHING]
        types = [step for step in looks if step.kind == "type"]
        # Most are entries of plain dictionaries, and dictionaries of hooks that are empty: these are compared in a loop.
        plain = [s for s in rows if s.kind == "entry" and type(s.owner) in _PLAIN]
        empty = [s for s in rows if s.kind == "keys" and s.value == ()]
        self._entries = [(s.owner, s.key, id(s.value), _plain(s.value)) for s in plain]
        self._empty = [step.owner for step in empty]
        self._rows = [(id(step.owner), self._look(step)) for step in rows]
        looped = {id(step) for step in (*plain, *empty)}
        pairs = zip(rows, self._rows, strict=True)
        self._rest = [look for step, (_, look) in pairs if id(step) not in looped]
        # The order of an OrderedDict changes without a write to it.
        ordered = [s for s in rows if s.kind == "keys" and _can_be_reordered(s)]
        known = {id(step) for step in (*attributes, *types)}
        self._others = [self._look(step) for step in looks if id(step) not in known]
        self._others += map(self._look, ordered)
        self._objects = torch_compat.IdentityGuard(
            [step.owner for step in types],
            [(step.owner, str(step.key), step.value) for step in attributes],
        )
        self._written = [0] * len(self._dicts)
        self._quiet = 0
        self._numbers = torch_compat.dict_versions(self._dicts)
        self.untouched: Callable[[], bool] = self._trust()

    def let_go(self) -> None:
        """Forget everything that is watched."""
        self.untouched = _unknown
        self._held.gone = True
        self._dicts, self._entries, self._empty, self._rest, self._others = [], [], [], [], []
        self._rows, self._objects = [], torch_compat.IdentityGuard([], [])
        self._held.clear()

    def compare(self) -> bool:
        """Look at every entry."""
        self.untouched = _unknown
        if self._held.gone or not self._same():
            return False
        self._learn()
        return True

    def _look(self, step: Step) -> _Look:
        return _Look(self._held.way_to(step.owner), step.key, step.kind, step.seen())

    def _same(self) -> bool:
        missing = NOTHING
        for owner, key, value, plain in self._entries:
            now = owner.get(key, missing)  # type: ignore[attr-defined]
            if id(now) != value and not (type(now) is type(plain) and now == plain):
                return False
        if any(self._empty):
            return False
        return (
            all(look.holds() for look in self._rest)
            and all(look.holds() for look in self._others)
            and self._objects.check()
        )

    def _learn(self) -> None:
        """Remember what was written, and trust the numbers again after a while without writes."""
        before, self._numbers = self._numbers, torch_compat.dict_versions(self._dicts)
        if before is None or self._numbers is None:
            return
        self._quiet += 1
        for index, (old, new) in enumerate(zip(before, self._numbers, strict=True)):
            if old != new:
                self._written[index] += 1
                if self._written[index] <= BUSY:
                    self._quiet = 0
        if self._quiet >= QUIET:
            self.untouched = self._trust()

    def _trust(self) -> Callable[[], bool]:
        """The cheap test, from the state of now."""
        if not torch_compat.guards_ready():
            return self._unwritten if self._numbers is not None and self._same() else _unknown
        self._objects.use_guards()
        pairs = zip(self._dicts, self._written, strict=True)
        busy = {id(each) for each, count in pairs if count >= BUSY}
        same = torch_compat.dict_guard([each for each in self._dicts if id(each) not in busy])
        if same is None or not self._same():  # another thread may write while the test is made
            return _unknown
        looked = [look for owner, look in self._rows if owner in busy]
        looked += self._others
        objects = self._objects.check
        if looked:
            return lambda: same() and objects() and all(look.holds() for look in looked)
        return (lambda: same() and objects()) if self._objects else same

    def _unwritten(self) -> bool:
        """The test while torch's guards are being imported: it takes the numbers one by one."""
        if torch_compat.guards_ready():
            self.untouched = self._trust()
            return self.untouched()
        self._quiet += 1
        if self._quiet > QUIET:  # the first calls of a process are not slowed down by it
            torch_compat.import_guards()
        return (
            torch_compat.dict_versions(self._dicts) == self._numbers
            and self._objects.check()
            and all(look.holds() for look in self._others)
        )


class _Held:
    """What a watch holds: objects weakly, and what no weak reference can point to, such as numbers and lists, as it is."""

    def __init__(self, watch: DictWatch) -> None:
        self.gone = False
        mine = weakref.ref(watch)

        def on_gone(_: object, ends: Callable[[], bool] = sys.is_finalizing) -> None:
            watch = mine()
            if watch is not None and not ends():
                watch.let_go()

        self._on_gone = on_gone
        self._weak: dict[int, weakref.ref[object]] = {}
        self._strong: dict[int, object] = {}

    def add(self, *objects: object) -> None:
        for each in objects:
            if each is None or id(each) in self._weak or id(each) in self._strong:
                continue
            try:
                self._weak[id(each)] = weakref.ref(each, self._on_gone)
            except TypeError:
                self._strong[id(each)] = each

    def way_to(self, owner: object) -> Callable[[], object]:
        """Gives ``owner``, which was added or is a dictionary."""
        weak = self._weak.get(id(owner))
        return weak if weak is not None else lambda: owner

    def clear(self) -> None:
        self._weak, self._strong = {}, {}


def _is_dictionary(step: Step) -> bool:
    return step.kind in ("entry", "keys") and isinstance(step.owner, dict)


def _can_be_reordered(step: Step) -> bool:
    return isinstance(step.owner, OrderedDict) and len(step.owner) > 1


def _plain(value: object) -> object:
    """A value for which an equal one of its type will do."""
    return value if type(value) in _EQUAL else _NOT_PLAIN


def _unknown() -> bool:
    return False
