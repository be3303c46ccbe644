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


def dict_versions(dicts: Sequence[object]) -> list[int] | None:
    """A number per dictionary, larger after each write to it; None where torch can't tell."""
    number = getattr(_guards(), "dict_version", None)
    return None if number is None else [number(each) for each in dicts]


def dict_guard(dicts: Sequence[object]) -> Callable[[], bool] | None:
    """A function that is true while no key of any of ``dicts`` is written; None where torch has none.

    These are Dynamo's guards of dictionaries: the first call visits each of them, later calls compare their numbers, which
    takes about a nanosecond each (since CPython 3.12, a write raises one flag instead, and a call reads the flag).
    """
    return _dict_guard(dicts) if _has_dict_guards() else None


class _Owner:
    """What holds the dictionaries; the guards need something that weak references can point to."""

    def __init__(self, dicts: Sequence[object]) -> None:
        self.dicts = list(dicts)


def _dict_guard(dicts: Sequence[object]) -> Callable[[], bool]:
    from torch._dynamo.guards import GuardManagerType

    kind = GuardManagerType.GUARD_MANAGER
    owner = _Owner(dicts)
    start = [owner]
    root = _guards().RootGuardManager()
    at_owner = root.list_getitem_manager(0, "", owner, kind)
    at_list = at_owner.getattr_manager("dicts", "", owner.dicts, kind)
    for index, each in enumerate(owner.dicts):
        at_dict = at_list.list_getitem_manager(index, "", each, kind)
        at_dict.add_dict_version_guard(each, [], None)
        at_dict.mark_tag_safe()
    at_list.mark_tag_safe()
    at_owner.mark_tag_safe()
    at_owner.mark_tag_safe_root()
    check = root.check
    check(start)  # it notes the dictionaries in its first call
    return functools.partial(check, start)


@functools.cache
def _has_dict_guards() -> bool:
    """Whether the guards exist and do what is wanted of them, tried on dictionaries of our own."""
    first, second = {"a": 1}, {"a": 1}
    try:
        unwritten = _dict_guard([first, second])
        before = unwritten() and unwritten()
        second["a"] = 2
        return before and not unwritten() and not unwritten()
    except (AttributeError, ImportError, TypeError, RuntimeError):
        return False


def _guards() -> Any:
    return getattr(getattr(torch._C, "_dynamo", None), "guards", None)
