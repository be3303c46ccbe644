"""Where a write into what guards are about, or on the way to a weight, would be seen.

Dictionaries, lists, sets, slots, cells, functions and the classes of objects are watched where look-ups go through them. What can't change needs nothing; where a
look-up runs code of the user's, that is run in every call, and where it finds another object each time, the guard is asked.
"""

from __future__ import annotations

import sys
import types
from collections import deque
from collections.abc import Iterable, Sequence

import torch

from piecework.code_objects import HEAP_TYPE
from piecework.runtime.torch_compat import Guarded, Place
from piecework.runtime.watch.places import MISSING, LookUps, Step, StepKind, found_at
from piecework.runtime.watch.values import CONSTANTS, OBJECTS

_TABLES = ("_parameters", "_buffers", "_modules")
_FUNCTION_STATE = frozenset(vars(types.FunctionType))
# What never changes once it is made, or leads only to what a look-up of its own goes into.
_FIXED = (
    *(int, float, complex, str, bytes, type(None), tuple, frozenset, range, slice),
    *(torch.Size, torch.dtype, torch.device, property, staticmethod, classmethod),
    *(types.CodeType, types.BuiltinFunctionType, types.MethodType, types.MappingProxyType),
)


class Steps:
    """The look-ups to watch for some guards.

    Args:
        guards: on the model.
        now: what is at their places.
        watched: places of tensors that only Dynamo compares.

    Attributes:
        found: look-ups, each once.
        classes: classes that decide what look-ups in their instances find.
        blind: guards that must be asked in every call.
    """

    def __init__(self, guards: Sequence[Guarded], now: LookUps, watched: Sequence[Place]) -> None:
        self.found: dict[tuple[int, str, object], Step] = {}
        self.classes: dict[type, None] = {}
        self.blind: list[Guarded] = []
        self._now, self._watched = now, set(map(id, watched))
        self._seen: dict[int, bool] = {}
        for guard in guards:
            ways = [self._way(each) for each in guard.places]
            if not (all(ways) and self._end(guard)):
                self.blind.append(guard)

    def watch(self, places: Iterable[Place]) -> None:
        """Watch the ways to places; what can't be watched is looked up in each comparison."""
        for place in places:
            while not self._way(place) and place.base is not None:
                kind: StepKind = "attribute" if place.kind == "attribute" else "item"
                self._add(self._now.at(place.base), place.key, kind)
                place = place.base

    # --- ways -----------------------------------------------------------------------------------------

    def _way(self, place: Place) -> bool:
        """Watch every look-up on the way to ``place``; False if one can't be watched."""
        known = self._seen.get(id(place))
        if known is None:
            known = self._seen[id(place)] = self._looked(place)
        return known

    def _looked(self, place: Place) -> bool:
        if place.kind in ("import", "unknown"):
            return place.kind == "import"  # a module that is imported stays
        if place.base is None:  # the trace's own variables
            return True
        if not self._way(place.base):
            return False
        base = self._now.at(place.base)
        return base is MISSING or self._look(base, place)

    def _look(self, base: object, place: Place) -> bool:
        match place.kind:
            case "attribute":
                return self._attribute(base, str(place.key))
            case "item":
                return self._item(base, place.key, place)
            case "key" | "at":
                return isinstance(base, dict) and self._contents(base)
            case "type":
                return self._class_of(base)
            case "class dict":
                return self._class(base)
            case "referent":  # never another object, and tensors are watched as weights
                return isinstance(self._now.at(place), torch.Tensor)
        return False

    def _attribute(self, base: object, name: str) -> bool:
        """Watch what ``base.name`` leads to, or that it leads nowhere."""
        if self._kept(base, name):
            return True
        # Code of the class's own finds it: as long as that finds one object, it is asked for it in every call.
        steady = found_at(base, name, "attribute") is found_at(base, name, "attribute")
        if steady:
            self._add(base, name, "attribute")
        return steady

    def _kept(self, base: object, name: str) -> bool:
        """Watch where ``base.name`` is held; False if nothing holds it that can be watched."""
        if isinstance(base, types.ModuleType):
            self._add(base.__dict__, name, holder=base)
            # Modules of torch's settings are of classes of their own, with properties that ask its C++.
            plain = type(base) is types.ModuleType and "__getattr__" not in base.__dict__
            return plain or name in base.__dict__
        if isinstance(base, type):
            if not any(name in each.__dict__ for each in base.__mro__):
                self._add(base, name, "attribute")
            return self._class(base)
        if type(base) is types.FunctionType:
            if name in _FUNCTION_STATE:
                self._add(base, name, "attribute")
            else:
                self._add(base.__dict__, name, holder=base)
            return True
        if type(base) is types.CellType:
            self._add(base, name, "attribute")
            return True
        if isinstance(base, torch.Tensor):
            return False
        return type(base) in _FIXED or self._of_instance(base, name)

    def _of_instance(self, base: object, name: str) -> bool:
        kind = type(base)
        held = getattr(base, "__dict__", None)
        # A look-up of the class's own was gone through by the trace, which guards all that it read.
        own_way = kind.__getattribute__ is not object.__getattribute__
        if own_way and not (type(held) is dict and name in held):
            return False
        self._class_of(base)
        of_class = next(
            (each.__dict__[name] for each in kind.__mro__ if name in each.__dict__), None
        )
        if hasattr(type(of_class), "__set__"):  # it comes before the instance's own
            if type(of_class) is types.MemberDescriptorType:
                self._add(base, name, "attribute")
                return True
            return name in ("__dict__", "__class__")
        if type(held) is not dict:
            return held is None and (of_class is not None or not hasattr(kind, "__getattr__"))
        self._own(base, held, name)
        if isinstance(base, torch.nn.Module) and name not in held and of_class is None:
            for table in _TABLES:
                self._add(held, table, holder=base)
                self._add(held[table], name)
            return True
        return name in held or of_class is not None or not hasattr(kind, "__getattr__")

    def _own(self, base: object, held: dict[str, object], name: str) -> None:
        """Watch an object's own attribute."""
        self._add(held, name, holder=base)
        if not isinstance(base, torch.nn.Module):
            self._add(base, "__dict__", "attribute")

    def _item(self, base: object, key: object, place: Place) -> bool:
        """Watch what ``base[key]`` leads to."""
        if isinstance(base, dict):
            self._add(base, key)
            return True
        if isinstance(base, (list, deque)):
            return self._contents(base)
        # Behind a proxy may be any dictionary; that of a class is watched with the class.
        owner = place.base
        of_class = isinstance(base, types.MappingProxyType) and owner is not None
        if of_class and owner is not None and owner.kind == "class dict":
            return True
        return isinstance(base, (tuple, str, range))

    # --- what is guarded there ------------------------------------------------------------------------

    def _end(self, guard: Guarded) -> bool:
        """Watch what the guard looks at in the object itself."""
        value, place, kind = self._now.at(guard.place), guard.place, guard.kind
        if value is MISSING or kind == "DUPLICATE_INPUT":
            return True
        if kind in OBJECTS:
            if kind == "CLOSURE_MATCH" and type(value) is types.FunctionType:
                self._add(value, "__code__", "attribute")
            if isinstance(value, type) and value.__flags__ & HEAP_TYPE:
                self._made(value)
            return True
        if kind in CONSTANTS:
            return not isinstance(value, (list, set)) or self._contents(value)
        match kind:
            case "TYPE_MATCH":
                return self._class_of(value)
            case "TENSOR_MATCH":
                self._add(value, "requires_grad", "attribute")
                return id(place) not in self._watched
            case "DICT_CONTAINS" | "DICT_NOT_CONTAINS":
                return place.kind == "class dict" or self._item(value, guard.about, place)
            case "HASATTR":
                return self._attribute(value, str(guard.about))
            case "NOT_PRESENT_IN_GENERIC_DICT":
                held = getattr(value, "__dict__", None)
                if type(held) is dict:
                    self._own(value, held, str(guard.about))
                return type(held) is dict
        return kind in _CONTENTS and self._contents(value)

    def _contents(self, value: object) -> bool:
        if isinstance(value, dict):
            self._add(value, None, "keys")
        elif isinstance(value, (list, deque)):
            self._add(value, None, "items")
        elif isinstance(value, set):
            self._add(value, None, "members")
        return isinstance(value, (dict, list, deque, set, *_FIXED))

    # --- objects and classes --------------------------------------------------------------------------

    def _class_of(self, value: object) -> bool:
        kind = type(value)
        # Objects of other types keep theirs.
        if kind.__flags__ & HEAP_TYPE and not isinstance(value, (torch.Tensor, type)):
            self._add(value, None, "type")
            self._class(kind)
        return True

    def _made(self, kind: type) -> None:
        """Watch a class that the model's code names, and may make objects of; torch's are taken as they are."""
        if kind.__module__.partition(".")[0] not in (*sys.stdlib_module_names, "torch"):
            self._class(kind)

    def _class(self, value: object) -> bool:
        if isinstance(value, type):
            self.classes[value] = None
        return isinstance(value, type)

    def _add(
        self,
        owner: object,
        key: object,
        kind: StepKind = "entry",
        holder: object = None,
    ) -> None:
        where = (id(owner), kind, key)
        if where not in self.found:
            self.found[where] = Step.of(owner, key, kind, holder)


_CONTENTS = (
    "SEQUENCE_LENGTH",
    "DICT_KEYS_MATCH",
    "EMPTY_NN_MODULE_HOOKS_DICT",
    "SET_CONTAINS",
    "SET_NOT_CONTAINS",
)
