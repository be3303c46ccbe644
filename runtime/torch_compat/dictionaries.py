"""Whether dictionaries were written. In: dictionaries. Out: a number per dictionary, and a test of all of them in one call into torch."""

from __future__ import annotations

import functools
import importlib
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch


def guards_ready() -> bool:
    """Whether Dynamo's guards can be made at once: they need its import, which takes a second."""
    return hasattr(sys.modules.get("torch._dynamo.guards"), "GuardManagerType")


@functools.cache
def import_guards() -> threading.Thread:
    """Import what guards need in a thread, so that a process which loaded what it runs begins without it."""
    target, name = importlib.import_module, "piecework imports torch._dynamo"
    found = threading.Thread(target=target, args=("torch._dynamo.guards",), name=name)
    found.start()
    return found


def dict_versions(dicts: Sequence[object]) -> list[tuple[int, bool]] | None:
    """A number per dictionary, larger after each write to it but perhaps its filling, and whether it holds anything; None where torch can't tell."""
    number = getattr(_guards(), "dict_version", None)
    return None if number is None else [(number(each), bool(each)) for each in dicts]


def dict_guard(dicts: Sequence[object]) -> Callable[[], bool] | None:
    """A function that is true while no key of any of ``dicts`` is written; None where torch has none.

    These are Dynamo's guards of dictionaries: the first call visits each of them, later calls compare their numbers, which
    takes about a nanosecond each (since CPython 3.12, a write raises one flag instead, and a call reads the flag).
    """
    if not _has_dict_guards():
        return None
    unwritten = _dict_guard(dicts)
    empty = [] if _sees_filling() else [each for each in dicts if type(each) is dict and not each]
    return (lambda: unwritten() and not any(empty)) if empty else unwritten


# torch looks through the guards of a list one after the other whenever it adds one.
_GROUP = 128


class Owner:
    """What holds guarded objects, a list of lists; the guards need something that weak references can point to."""

    def __init__(self, objects: Sequence[object]) -> None:
        starts = range(0, len(objects), _GROUP)
        self.groups = [list(objects[start : start + _GROUP]) for start in starts]

    def managers(self, root: Any) -> tuple[list[Any], list[Any]]:
        """Guard managers under ``root``, whose check takes a list that begins with this: of what holds the objects, and of each object."""
        from torch._dynamo.guards import GuardManagerType

        kind = GuardManagerType.GUARD_MANAGER
        at_owner = root.list_getitem_manager(0, "", self, kind)
        at_groups = at_owner.getattr_manager("groups", "", self.groups, kind)
        holders, objects = [at_owner, at_groups], []
        for number, group in enumerate(self.groups):
            at_group = at_groups.list_getitem_manager(number, "", group, kind)
            holders.append(at_group)
            for index, each in enumerate(group):
                objects.append(at_group.list_getitem_manager(index, "", each, kind))
        return holders, objects


def _dict_guard(dicts: Sequence[object]) -> Callable[[], bool]:
    owner = Owner(dicts)
    root = _guards().RootGuardManager()
    holders, managers = owner.managers(root)
    for each, at_dict in zip(dicts, managers, strict=True):
        at_dict.add_dict_version_guard(each, [], None)
    for manager in (*holders, *managers):
        manager.mark_tag_safe()
    holders[0].mark_tag_safe_root()
    start, check = [owner], root.check
    check(start)  # it notes the dictionaries in its first call
    return functools.partial(check, start)


@functools.cache
def _sees_filling() -> bool:
    """Whether the guards see ``update`` of an empty dictionary; with CPython 3.12 they don't."""
    held: dict[str, int] = {}
    unwritten = _dict_guard([held])
    held.update(a=1)
    return not unwritten()


@functools.cache
def _has_dict_guards() -> bool:
    """Whether the guards exist and do what is wanted of them, tried on dictionaries of our own."""
    first, second = {"a": 1}, {"a": 1}
    try:
        unwritten = _dict_guard([first, *({} for _ in range(_GROUP)), second])
        before = unwritten() and unwritten()
        second["a"] = 2
        return before and not unwritten() and not unwritten()
    except (AttributeError, ImportError, TypeError, RuntimeError):
        return False


def _guards() -> Any:
    return getattr(getattr(torch._C, "_dynamo", None), "guards", None)
