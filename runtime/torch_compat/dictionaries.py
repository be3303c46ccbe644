"""Whether dictionaries were written, and objects are of the same classes and attributes, each in one call into torch."""

from __future__ import annotations

import functools
import importlib
import json
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
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
    if not _sees_attributes():
        return None
    number = _guards().dict_version
    return [(number(each), bool(each)) for each in dicts]


@functools.cache
def _sees_attributes() -> bool:
    """Whether the numbers tell of an attribute that is set; CPython 3.13.0 forgets to (its issue 125608)."""
    number = getattr(_guards(), "dict_version", None)
    if number is None:
        return False
    tried = threading.Thread()
    before = number(vars(tried))
    tried.daemon = True
    return bool(number(vars(tried)) != before)


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
    held = {"a": 1}
    return _sees_attributes() and _tells(
        lambda: _dict_guard([{"a": 1}, *({} for _ in range(_GROUP)), held]),
        lambda: held.update(a=2),
    )


def _tells(make: Callable[[], Callable[[], bool]], change: Callable[[], None]) -> bool:
    """Whether guards exist and do what is wanted of them, tried on objects of our own."""
    try:
        holds = make()
        before = holds() and holds()
        change()
        return before and not holds() and not holds()
    except (AttributeError, ImportError, TypeError, RuntimeError):
        return False


class IdentityGuard:
    """A test that objects have the classes, and attributes the values, that they have now; it holds none of these but by weak references.

    Args:
        objects: those whose class is compared.
        attributes: owner, name, and what is there; they must not be computed at each access. The caller sees to it that no value goes.

    Attributes:
        check: the test; in Python until `use_guards` was called.
    """

    def __init__(
        self, objects: Iterable[object], attributes: Iterable[tuple[object, str, object]]
    ) -> None:
        kinds = {id(each): each for each in objects}.values()
        self._kinds = [(_weakly(each), id(type(each))) for each in kinds]
        self._rows = [(_weakly(each), name, id(value)) for each, name, value in attributes]
        self.check: Callable[[], bool] = self._compare if self else _true
        self._by_guards = False
        self.use_guards()

    def __bool__(self) -> bool:
        return bool(self._kinds or self._rows)

    def use_guards(self) -> None:
        """Compare in one call into torch, once its guards are imported."""
        if self and not self._by_guards and guards_ready() and _has_identity_guards():
            self._by_guards = True
            if self._compare():
                self.check = self._guarded()

    def _compare(self) -> bool:
        return all(id(type(_there(owner))) == kind for owner, kind in self._kinds) and all(
            id(getattr(_there(owner), name, None)) == value for owner, name, value in self._rows
        )

    def _guarded(self) -> Callable[[], bool]:
        from torch._dynamo.guards import GuardManagerType

        kind = GuardManagerType.GUARD_MANAGER
        owner = Owner([*(each[0] for each in self._kinds), *(each[0] for each in self._rows)])
        root = _guards().RootGuardManager()
        _, managers = owner.managers(root)
        objects = [
            (
                manager.weakref_call_manager("", _there(each[0]), kind)
                if type(each[0]) is weakref.ref
                else manager
            )
            for each, manager in zip([*self._kinds, *self._rows], managers, strict=True)
        ]
        count = len(self._kinds)
        for (_, number), at_object in zip(self._kinds, objects[:count], strict=True):
            at_object.add_type_match_guard(number, [""], None)
        for (held, name, number), at_object in zip(self._rows, objects[count:], strict=True):
            value = getattr(_there(held), name, None)
            at_value = at_object.getattr_manager(name, "", value, kind)
            at_value.add_id_match_guard(number, [""], None)
        return functools.partial(root.check, [owner])


def _weakly(value: object) -> object:
    try:
        return weakref.ref(value)
    except TypeError:
        return value


def _there(held: object) -> object:
    return held() if type(held) is weakref.ref else held  # type: ignore[operator]


@functools.cache
def _has_identity_guards() -> bool:
    def tried() -> None: ...

    guard = IdentityGuard([], [])
    guard._kinds = [(_weakly(tried), id(type(tried)))]
    guard._rows = [(_weakly(tried), "__doc__", id(None))]
    return _tells(guard._guarded, functools.partial(setattr, tried, "__doc__", "said"))


def _true() -> bool:
    return True


def global_state() -> dict[str, object]:
    """What Dynamo's guard on torch's global state compares, by name."""
    told = getattr(GlobalStateGuard(), "__getstate__", None)
    try:
        found = json.loads(told()) if told is not None else None  # type: ignore[misc]
    except (TypeError, ValueError):
        found = None
    if not isinstance(found, dict):  # torch was built without it
        found = {
            "allow_bf16_reduce": torch._C._get_cublas_allow_bf16_reduced_precision_reduction(),
            "allow_fp16_reduce": torch._C._get_cublas_allow_fp16_reduced_precision_reduction(),
            "allow_tf32": torch._C._get_cublas_allow_tf32(),
            "deterministic_algorithms": torch._C._get_deterministic_algorithms(),
        }
    # torch numbers dtypes, from one version to another otherwise.
    return {**found, "default_dtype": str(torch.get_default_dtype())}


#: Tells by ``check()`` whether torch's global state is what it was when this was made.
GlobalStateGuard: Callable[[], Any] = torch._C._dynamo.guards.GlobalStateGuard


def _guards() -> Any:
    return getattr(getattr(torch._C, "_dynamo", None), "guards", None)
