"""Whether look-ups still lead to the same objects. In: the look-ups. Out: a test that costs a few microseconds while nothing is written.

Nothing is put into anybody's objects. CPython numbers the writes to each dictionary, and torch can compare
these numbers, the classes of objects and what their attributes are in calls into C (Dynamo's guards do); only after a write are the
entries themselves looked at. Where torch can't, every test looks at every entry.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from piecework.runtime import torch_compat
from piecework.runtime.bind.places import NOTHING, Step

QUIET = 8  # tests without a write, after which the numbers are trusted again: trusting costs milliseconds once
_PLAIN = (dict, OrderedDict)
BUSY = (
    8  # tests that found a dictionary written, after which its entries are looked at in every test
)


class DictWatch:
    """A test of many look-ups.

    Args:
        steps: what was found where.

    Attributes:
        untouched: True if nothing was written; False says only that something may have been: then call `compare`.
    """

    def __init__(self, steps: Sequence[Step]) -> None:
        owners: dict[int, object] = {}
        for step in steps:
            if _is_dictionary(step):
                owners[id(step.owner)] = step.owner
        self._dicts = list(owners.values())
        self._rows = [step for step in steps if _is_dictionary(step)]
        looks = [step for step in steps if not _is_dictionary(step)]
        # The order of an OrderedDict changes without a write to it.
        ordered = [step for step in self._rows if step.kind == "keys" and _can_be_reordered(step)]
        self._attributes = [s for s in looks if s.kind == "attribute" and s.value is not NOTHING]
        # Most are entries of plain dictionaries, and dictionaries of hooks that are empty: these are compared in a loop.
        plain = [s for s in self._rows if s.kind == "entry" and type(s.owner) in _PLAIN]
        empty = [s for s in self._rows if s.kind == "keys" and s.value == ()]
        self._entries = [(step.owner, step.key, step.value) for step in plain]
        self._empty = [step.owner for step in empty]
        looped = {id(step) for step in (*plain, *empty)}
        self._rest = [step for step in self._rows if id(step) not in looped]
        self._types = [step for step in looks if step.kind == "type"]
        known = {id(step) for step in (*self._attributes, *self._types)}
        self._others = [step for step in looks if id(step) not in known] + ordered
        self._written = [0] * len(self._dicts)
        self._quiet = 0
        self._numbers = torch_compat.dict_versions(self._dicts)
        self._by_guards = torch_compat.guards_ready()
        self._same_objects = self._objects()
        self.untouched: Callable[[], bool] = self._trust()

    def compare(self) -> bool:
        """Look at every entry."""
        self.untouched = _unknown
        if not self._same():
            return False
        self._learn()
        return True

    def _same(self) -> bool:
        missing = NOTHING
        for owner, key, value in self._entries:
            if owner.get(key, missing) is not value:  # type: ignore[attr-defined]
                return False
        if any(self._empty):
            return False
        return (
            all(step.holds() for step in self._rest)
            and all(step.holds() for step in self._others)
            and self._same_objects()
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

    def _objects(self) -> Callable[[], bool]:
        return torch_compat.identity_guard(
            [step.owner for step in self._types],
            [(step.owner, str(step.key), step.value) for step in self._attributes],
        )

    def _trust(self) -> Callable[[], bool]:
        """The cheap test, from the state of now."""
        if not torch_compat.guards_ready():
            return self._unwritten if self._numbers is not None and self._same() else _unknown
        if not self._by_guards and self._same():
            self._by_guards, self._same_objects = True, self._objects()
        pairs = zip(self._dicts, self._written, strict=True)
        busy = {id(each) for each, count in pairs if count >= BUSY}
        same = torch_compat.dict_guard([each for each in self._dicts if id(each) not in busy])
        if same is None or not self._same():  # another thread may write while the test is made
            return _unknown
        looked = [step for step in self._rows if id(step.owner) in busy] + self._others
        objects = self._same_objects
        if looked:
            return lambda: same() and objects() and all(step.holds() for step in looked)
        if self._types or self._attributes:
            return lambda: same() and objects()
        return same

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
            and self._same_objects()
            and all(step.holds() for step in self._others)
        )


def _is_dictionary(step: Step) -> bool:
    return step.kind in ("entry", "keys") and isinstance(step.owner, dict)


def _can_be_reordered(step: Step) -> bool:
    return isinstance(step.owner, OrderedDict) and len(step.owner) > 1


def _unknown() -> bool:
    return False
