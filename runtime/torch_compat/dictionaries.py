"""Whether dictionaries were written, told by one call into torch, and torch's global state."""

import functools
import gc
import importlib
import json
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

_GROUP = 128  # torch looks through the guards of a list whenever it adds one

_number: Callable[[object], int] = torch._C._dynamo.guards.dict_version

#: Tells by ``check()`` whether torch's global state is what it was when this was made.
GlobalStateGuard: Callable[[], Any] = torch._C._dynamo.guards.GlobalStateGuard


def guards_ready() -> bool:
    """Whether Dynamo's guards can be made at once: they need its import, which takes a second."""
    return hasattr(sys.modules.get("torch._dynamo.guards"), "GuardManagerType")


@functools.cache
def import_guards() -> threading.Thread:
    """Import what guards need in a thread: what was loaded begins without it."""
    target, name = importlib.import_module, "piecework imports torch._dynamo"
    found = threading.Thread(target=target, args=("torch._dynamo.guards",), name=name)
    found.start()
    return found


def dict_versions(dicts: Sequence[object]) -> list[int] | None:
    """A number per dictionary, larger after each write but its filling; whether it holds any."""
    return [*map(_number, dicts), *map(bool, dicts)] if _sees_attributes() else None


@functools.cache
def _sees_attributes() -> bool:
    """Whether numbers tell of attributes that are set; not in CPython 3.13.0 (issue 125608)."""
    tried = threading.Thread()
    before = _number(vars(tried))
    tried.daemon = True
    return bool(_number(vars(tried)) != before)


def dict_guard(dicts: Sequence[object]) -> Callable[[], bool] | None:
    """True while no key of ``dicts`` is written, in a nanosecond each; None where torch can't."""
    if not _sees_attributes() or not _sees(filling=False):
        return None
    unwritten = _dict_guard(dicts)
    empty = [] if _sees(filling=True) else [each for each in dicts if not each]
    return (lambda: unwritten() and not any(empty)) if empty else unwritten


class _Owner:
    """Dictionaries in lists of lists; guards need something that weak references can point to."""

    def __init__(self, dicts: Sequence[object]) -> None:
        starts = range(0, len(dicts), _GROUP)
        self.groups = [list(dicts[start : start + _GROUP]) for start in starts]


def _dict_guard(dicts: Sequence[object]) -> Callable[[], bool]:
    from torch._dynamo.guards import GuardManagerType

    kind, owner = GuardManagerType.GUARD_MANAGER, _Owner(dicts)
    root = torch._C._dynamo.guards.RootGuardManager()
    at_owner = root.list_getitem_manager(0, "", owner, kind)
    at_groups = at_owner.getattr_manager("groups", "", owner.groups, kind)
    managers = [at_owner, at_groups]
    for number, group in enumerate(owner.groups):
        at_group = at_groups.list_getitem_manager(number, "", group, kind)
        managers.append(at_group)
        for index, each in enumerate(group):
            at_dict = at_group.list_getitem_manager(index, "", each, kind)
            at_dict.add_dict_version_guard(each, [], None)
            managers.append(at_dict)
    for manager in managers:
        manager.mark_tag_safe()
    at_owner.mark_tag_safe_root()
    root.check([owner])  # it notes the dictionaries in its first call
    return functools.partial(root.check, [owner])


@functools.cache
def _sees(*, filling: bool) -> bool:
    """Whether guards see a write, or the filling of an empty dictionary (not in CPython 3.12)."""
    held = {} if filling else {"a": 1}
    unwritten = _dict_guard([*({} for _ in range(_GROUP)), held])
    before = unwritten() and unwritten()
    held.update(a=2)
    return before and not unwritten() and not unwritten()


def class_dict(kind: type) -> dict[str, object]:
    """The dictionary behind ``kind.__dict__``."""
    found: dict[str, object] = gc.get_referents(kind.__dict__)[0]
    return found


def global_state() -> dict[str, object]:
    """What Dynamo's guard on torch's global state compares, by name."""
    found: dict[str, object] = json.loads(GlobalStateGuard().__getstate__())
    # torch numbers dtypes, from one version to another otherwise.
    return {**found, "default_dtype": str(torch.get_default_dtype())}
