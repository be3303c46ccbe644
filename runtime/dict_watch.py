"""Whether look-ups still lead to the same objects. In: the look-ups. Out: a test that costs a fraction of a microsecond while nothing is written.

Nothing is put into anybody's dictionaries. CPython numbers the writes to each dictionary, and torch can compare
these numbers in one call (Dynamo's guards do); only after a write are the entries themselves looked at. Where torch can't, every
test looks at every entry.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from piecework.runtime import torch_compat
from piecework.runtime.places import Step

WATCHED = (dict, OrderedDict)  # others may override what a look-up does
QUIET = 8  # tests without a write, after which the numbers are trusted again: trusting costs milliseconds once
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
        owners: dict[int, dict[object, object]] = {}
        for step in steps:
            if type(step.owner) in WATCHED:
                owners[id(step.owner)] = step.owner
        self._dicts = list(owners.values())
        held = [step for step in steps if type(step.owner) in WATCHED]
        self._rows = [(s.owner, s.key, s.value) for s in held if s.kind != "size"]
        self._sizes = [(s.owner, s.value) for s in held if s.kind == "size"]
        # Dictionaries of hooks that are empty: registering any hook moves torch's count, which is one number to look at.
        empty = {id(owner) for owner, size in self._sizes if not size} - {
            id(owner) for owner, _, _ in self._rows
        }
        self._dicts = [each for each in self._dicts if id(each) not in empty]
        self._counts_hooks = bool(empty)
        self._hooks = torch_compat.hooks_registered()
        self._others = [step for step in steps if type(step.owner) not in WATCHED]
        self._written = [0] * len(self._dicts)
        self._quiet = 0
        self._numbers = torch_compat.dict_versions(self._dicts)
        self.untouched: Callable[[], bool] = self._trust()

    def compare(self) -> bool:
        """Look at every entry."""
        trusted, self.untouched = self.untouched, _unknown
        hooks = torch_compat.hooks_registered()
        if not self._same():
            return False
        self._hooks, before = hooks, self._hooks
        if (
            hooks != before and trusted()
        ):  # a hook was registered elsewhere, and nothing was written
            self.untouched = trusted
        else:
            self._learn()
        return True

    def _same(self) -> bool:
        for owner, key, value in self._rows:
            if owner.get(key) is not value:  # type: ignore[attr-defined]
                return False
        for owner, size in self._sizes:
            if len(owner) != size:  # type: ignore[arg-type]
                return False
        return all(step.holds() for step in self._others)

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
        pairs = zip(self._dicts, self._written, strict=True)
        busy = {id(each) for each, count in pairs if count >= BUSY}
        same = torch_compat.dict_guard([each for each in self._dicts if id(each) not in busy])
        if same is None or not self._same():  # another thread may write while the test is made
            return _unknown
        rows = [row for row in self._rows if id(row[0]) in busy]
        sizes = [row for row in self._sizes if id(row[0]) in busy]
        others = self._others
        if not (rows or sizes or others or self._counts_hooks):
            return same
        registered = torch_compat.hooks_registered
        if not (rows or sizes or others):
            return lambda: registered() == self._hooks and same()

        def untouched() -> bool:
            return (
                registered() == self._hooks
                and same()
                and all(owner.get(key) is value for owner, key, value in rows)  # type: ignore[attr-defined]
                and all(len(owner) == size for owner, size in sizes)  # type: ignore[arg-type]
                and all(step.holds() for step in others)
            )

        return untouched


def _unknown() -> bool:
    return False
