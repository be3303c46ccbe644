"""Which look-ups to watch: those on the way to what guards are about, or to a weight.

What can't change needs nothing; where a look-up runs code of the user's, it is made in every call.
"""

import sys
import types
from collections import deque
from collections.abc import Iterable, Mapping

import torch

from piecework.code_objects import HEAP_TYPE
from piecework.runtime.torch_compat import Guarded, Place
from piecework.runtime.watch.dict_watch import Look, LookKind
from piecework.runtime.watch.places import MISSING, TABLES, LookUps, static

_OF_LIBRARIES = {"torch", *sys.stdlib_module_names}


class Looks:
    """The look-ups to watch for some guards and weights."""

    def __init__(self, now: LookUps, guards: Iterable[Guarded]) -> None:
        self.found: dict[tuple[int, str, object], Look] = {}  # each once
        # those that decide what is found in their instances, each with a place that leads to it
        self.classes: dict[type, Place] = {}
        self.blind = False  # there is something that only its guard can tell of
        self._now = now
        self._known: dict[Place, bool] = {}
        for guard in guards:
            ways = [self._way(each) for each in guard.places]
            self.blind |= not (all(ways) and self._end(guard))

    def add_weights(self, places: Iterable[Place]) -> None:
        for place in places:
            while not self._way(place) and len(place) > 1:
                kind, key = place[-1]
                place = place[:-1]
                self.look(self._now.at(place), key, "attribute" if kind == "attribute" else "item")

    def look(self, owner: object, key: object, kind: LookKind = "entry") -> bool:
        """Watch a look-up; classes of C stay as they are."""
        where = (id(owner), kind, key)
        stays = kind == "static" and not owner.__flags__ & HEAP_TYPE  # type: ignore[attr-defined]
        if where not in self.found and not stays:
            self.found[where] = Look.of(owner, key, kind)
        return True

    def _way(self, place: Place) -> bool:
        """Watch every look-up on the way to ``place``; False if one can't be watched."""
        if place not in self._known:
            self._known[place] = self._looked(place)
        return self._known[place]

    def _looked(self, place: Place) -> bool:
        (kind, key), base = place[-1], self._now.at(place[:-1]) if len(place) > 1 else MISSING
        if len(place) == 1:  # the trace's own variables, and modules that are imported, stay
            return kind != "unknown"
        if not self._way(place[:-1]):
            return False
        if base is MISSING:
            return True
        match kind:
            case "attribute":
                return self._attribute(base, str(key), place[:-1])
            case "item" if isinstance(base, dict):
                return self.look(base, key)
            case "item" if isinstance(base, (tuple, str, range)):
                return True
            case "item" if place[-2][0] == "class dict":
                return self.look(self._now.at(place[:-2]), key, "static")
            case "item":
                return isinstance(base, (list, deque)) and self._contents(base)
            case "key" | "at" | "member":
                return self._contents(base)
            case "type":
                return self._class_of(base, place[:-1])
            case "class dict" | "static":
                self.classes.setdefault(base, place[:-1])
                return kind == "class dict" or self.look(base, key, "static")
        return kind == "referent" and isinstance(self._now.at(place), torch.Tensor)

    def _attribute(self, base: object, name: str, place: Place) -> bool:
        """Watch where ``base.name`` is held, or that it is not there."""
        kind, held = type(base), getattr(base, "__dict__", None)
        if isinstance(base, type):
            self.classes.setdefault(base, place)
            self.look(base, name, "static")
            return static(base, name) is not MISSING or self._computed(base, name)
        self._class_of(base, place)
        of_class = static(kind, name)
        self.look(kind, name, "static")
        # A look-up of the class's own was gone through by the trace, which guards all that it read.
        has_own_way = isinstance(kind.__getattribute__, types.FunctionType)
        has_setter = hasattr(type(of_class), "__set__")
        if name in ("__dict__", "__class__"):
            return True
        if has_setter or (has_own_way and not (type(held) is dict and name in held)):
            return self._computed(base, name)
        if type(held) is dict:
            self.look(held, name)
            if not isinstance(base, (torch.nn.Module, types.ModuleType)):
                self.look(base, "__dict__", "attribute")
            if name in held:
                return True
        if of_class is MISSING and isinstance(base, torch.nn.Module):
            for table in TABLES:
                self.look(held, table)
                self.look(held[table], name)
            return True
        may_compute = hasattr(kind, "__getattr__") or isinstance(base, types.ModuleType)
        return of_class is not MISSING or not may_compute or self._computed(base, name)

    def _computed(self, base: object, name: str) -> bool:
        """Look it up in every call, as long as it is one object."""
        now = getattr(base, name, MISSING)
        return now is getattr(base, name, MISSING) and self.look(base, name, "attribute")

    def _end(self, guard: Guarded) -> bool:
        """Watch what a guard looks at in the object itself."""
        value, about = self._now.at(guard.place), guard.about
        if value is MISSING or guard.other:
            return True
        self._class_of(value, guard.place)
        if about is not None:
            if isinstance(value, dict):
                return self.look(value, about)
            if isinstance(value, (list, deque, set, frozenset)):
                return self._contents(value)
            if guard.place[-1][0] == "class dict":
                return self.look(self._now.at(guard.place[:-1]), about, "static")
            return self._attribute(value, str(about), guard.place)
        if isinstance(value, torch.Tensor):
            return self.look(value, "requires_grad", "attribute")
        if guard.kind == "TYPE_MATCH":
            return True
        if hasattr(value, "__code__"):
            return self.look(value, "__code__", "attribute")
        if isinstance(value, type) and value.__module__.partition(".")[0] not in _OF_LIBRARIES:
            self.classes.setdefault(value, guard.place)  # the model's code may make objects of it
        return not isinstance(value, (dict, list, deque, set)) or self._contents(value, guard.place)

    def _contents(self, value: object, place: Place = ()) -> bool:
        if isinstance(value, dict):
            is_hooks = not value and bool(place) and "_hooks" in str(place[-1][1])
            return self.look(value, None, "hooks" if is_hooks else "keys")
        return not isinstance(value, (list, deque, set)) or self.look(value, None, "contents")

    def _class_of(self, value: object, place: Place) -> bool:
        kind = type(value)  # objects of other types keep theirs
        if kind.__flags__ & HEAP_TYPE and not isinstance(value, (torch.Tensor, type)):
            self.look(value, None, "type")
            self.classes.setdefault(kind, (*place, ("type", None)))
        return True


#: The kind of what `method_guards` gives.
METHOD = "METHOD"
_STATE = ("__code__", "__defaults__", "__kwdefaults__")
# Where Python itself looks, whatever the traced code says.
_ALWAYS = ("__call__", "__getattr__", "__getattribute__")


def method_looks(classes: Iterable[type], code: frozenset[types.CodeType]) -> list[Look]:
    """The traced methods of classes, with code and defaults, which Dynamo takes for constant."""
    found, functions = [], {}
    for kind in (each for each in classes if each.__flags__ & HEAP_TYPE):
        held = {k: v for each in reversed(kind.__mro__) for k, v in vars(each).items()}
        traced = {k for k, v in held.items() if (f := function_of(v)) and f.__code__ in code}
        found += [Look.of(kind, name, "static") for name in (*_ALWAYS, *traced - {*_ALWAYS})]
        functions.update({function_of(held[name]): None for name in traced})
    states = (Look.of(each, name, "attribute") for each in functions for name in _STATE)
    # A call that was traced without defaults needs none.
    return [*found, *(look for look in states if look.value is not None)]


def method_guards(looks: Iterable[Look], classes: Mapping[type, Place]) -> list[Guarded]:
    """Traced methods as what another process can compare."""
    methods = (look for look in looks if look.kind == "static")
    return [Guarded((*classes[e.owner], ("static", e.key)), METHOD) for e in methods]


def function_of(value: object) -> types.FunctionType | None:
    """The function of a class body's function, property, static or class method; None of others."""
    value = getattr(value, "fget", getattr(value, "__func__", value))
    return value if isinstance(value, types.FunctionType) else None
