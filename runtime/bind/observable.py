"""Where a change of what facts rest on would be seen. In: facts, and values of now. Out: look-ups to watch, classes, and the facts that nothing can be watched for.

What a look-up goes through is watched where a write into it can be seen: dictionaries, lists, sets, slots, cells, functions and the classes
of objects. What cannot change needs nothing; for everything else the fact itself is compared in every call.
"""

from __future__ import annotations

import abc
import copy
import enum
import operator
import types
from collections import deque
from collections.abc import Iterable

import torch

from piecework.code_objects import HEAP_TYPE
from piecework.runtime.bind.facts import (
    CONSTANT_KINDS,
    IDENTITY_KINDS,
    MISSING,
    OF_FUNCTIONS,
    Fact,
    Values,
    has_own_metaclass,
    is_users,
    is_value,
    place_text,
)
from piecework.runtime.bind.places import Step
from piecework.runtime.torch_compat import Place

THERE = object()
_TABLES = ("_parameters", "_buffers", "_modules")
_FUNCTION_STATE = frozenset(vars(types.FunctionType))
_PLAIN = (bool, int, float, complex, str, bytes)
# What never changes once it is made, or leads only to what a look-up of its own goes into.
_FIXED = (
    int,
    float,
    complex,
    str,
    bytes,
    type(None),
    tuple,
    frozenset,
    range,
    slice,
    torch.Size,
    torch.dtype,
    torch.device,
    types.CodeType,
    types.BuiltinFunctionType,
    types.MethodType,
    types.MappingProxyType,
    property,
    staticmethod,
    classmethod,
)
# Of these, `_everything` looks at nothing more.
_LEAVES = (
    *_PLAIN,
    *(type(None), type(...), range, slice, torch.Size, torch.dtype, torch.device),
    *(types.FunctionType, types.BuiltinFunctionType, types.ModuleType),
)
_MUCH = 1000


class Touch:
    """What to watch for some facts.

    Args:
        facts: about the model.
        values: of now.

    Attributes:
        steps: look-ups, each once.
        classes: classes that decide what look-ups in their instances find.
        always: facts that must be compared in every call.
    """

    def __init__(self, facts: Iterable[Fact], values: Values) -> None:
        self.steps: dict[tuple[int, str, object], Step] = {}
        self.classes: dict[type, None] = {}
        self.always: list[Fact] = []
        self._values = values
        self._seen: dict[int, bool] = {}
        self._texts: dict[int, str] = {}
        for fact in facts:
            places = [fact.place] if fact.other is None else [fact.place, fact.other]
            if not all([self._way(each) for each in places] + [self._guarded(fact)]):
                self.always.append(fact)
        self._values = Values({})  # what lies on the ways is in the steps
        self._seen, self._texts = {}, {}

    def renewed(self) -> Touch | None:
        """The same from the state of now, where its classes hold what they held; None where other look-ups may have to be watched than before."""
        steps: dict[tuple[int, str, object], Step] = {}
        for where, step in self.steps.items():
            steps[where] = now = step if step.holds() else step.again()
            if now is not step and not _leads_nowhere(step, now):
                return None
        found = copy.copy(self)
        found.steps = steps
        return found

    # --- ways ----------------------------------------------------------------------------------------

    def _way(self, place: Place) -> bool:
        """Watch every look-up on the way to ``place``; False if one can't be watched."""
        known = self._seen.get(id(place))
        if known is None:
            known = self._seen[id(place)] = self._looked(place)
        return known

    def _looked(self, place: Place) -> bool:
        if place.kind == "import":
            return False
        if place.base is None:  # the trace's own variables
            return True
        base = self._values.at(place.base)
        if not self._way(place.base):
            return False
        return base is MISSING or self._look(base, place.kind, place.key, place)

    def _look(self, base: object, kind: str, key: object, place: Place) -> bool:
        match kind:
            case "attribute":
                return self._attribute(base, str(key), place, self._values.at(place))
            case "item":
                return self._item(base, key, place, place.base)
            case "key" | "at":
                return self._keys(base, place)
            case "type":
                return self._class_of(base, place)
            case "class dict":
                return self._class(base)
        return False

    def _attribute(self, base: object, name: str, place: Place, found: object) -> bool:
        """Watch what ``base.name`` leads to, which is ``found`` now; `THERE` if all that counts is that something is."""
        if isinstance(base, types.ModuleType):
            self._add(base.__dict__, name, place)
            # Modules of torch's settings are of classes of their own, with properties that ask its C++.
            return name in base.__dict__ or (
                type(base) is types.ModuleType and "__getattr__" not in base.__dict__
            )
        if isinstance(base, type):
            if not any(name in each.__dict__ for each in base.__mro__):
                self._add(base, name, place, "attribute")
            return self._class(base)
        if type(base) is types.FunctionType:
            if name in _FUNCTION_STATE:
                self._add(base, name, place, "attribute")
            else:
                self._add(base.__dict__, name, place)
            return True
        if type(base) is types.CellType:
            self._add(base, name, place, "attribute")
            return True
        return type(base) in _FIXED or self._of_instance(base, name, place, found)

    def _of_instance(self, base: object, name: str, place: Place, found: object) -> bool:
        kind = type(base)
        if isinstance(base, torch.Tensor):
            return False
        # A look-up of the class's own was gone through by the trace, which guards all that it read.
        own_way = kind.__getattribute__ is not object.__getattribute__
        if own_way and not _ends_as_a_plain_one(base, name, found):
            return False
        self._class_of(base, place)
        of_class = next(
            (each.__dict__[name] for each in kind.__mro__ if name in each.__dict__), None
        )
        held = getattr(base, "__dict__", None)
        if hasattr(type(of_class), "__set__"):  # it comes before the instance's own
            if type(of_class) is types.MemberDescriptorType:
                self._add(base, name, place, "attribute")
                return True
            return name in ("__dict__", "__class__") or (found is THERE and _is_traced(of_class))
        if type(held) is not dict:
            return held is None and (of_class is not None or not hasattr(kind, "__getattr__"))
        self._add(held, name, place)
        if not isinstance(base, torch.nn.Module):
            self._add(base, "__dict__", place, "attribute")
        elif name not in held and of_class is None:
            for table in _TABLES:
                self._add(held, table, place)
                self._add(held[table], name, place)
            return True
        return name in held or of_class is not None or not hasattr(kind, "__getattr__")

    def _names(self, value: object, names: Iterable[str], place: Place) -> bool:
        """Watch which of ``names`` lead somewhere in an object, a class or a module."""
        held = getattr(value, "__dict__", None)
        if isinstance(value, types.ModuleType):
            for name in names:
                self._add(held, name, place)
            return True
        if isinstance(value, type):
            return self._class(value)
        if type(held) is not dict:
            return False
        tables = [held[table] for table in _TABLES if isinstance(value, torch.nn.Module)]
        for each in (held, *tables):
            self._add(each, None, place, "keys")
        if not tables:
            self._add(value, "__dict__", place, "attribute")
        return self._class_of(value, place)

    def _own_attribute(self, base: object, name: str, place: Place) -> bool:
        """Watch whether an object has an attribute of its own, whatever its class says."""
        held = getattr(base, "__dict__", None)
        if type(held) is not dict:
            return False
        self._add(held, name, place)
        if not isinstance(base, torch.nn.Module):
            self._add(base, "__dict__", place, "attribute")
        return True

    def _item(self, base: object, key: object, place: Place, owner: Place) -> bool:
        """Watch what ``base[key]`` leads to; ``owner`` is the place of ``base``."""
        if isinstance(base, dict):
            self._add(base, key, place)
            return True
        if isinstance(base, (list, deque)):
            return self._contents(base, place)
        # Behind a proxy may be any dictionary; that of a class is watched with the class.
        of_class = isinstance(base, types.MappingProxyType) and owner.kind == "class dict"
        return of_class or isinstance(base, (tuple, str, range))

    # --- what is guarded there --------------------------------------------------------------------------

    def _guarded(self, fact: Fact) -> bool:
        """Watch what the fact looks at in the object itself."""
        value, kind, place = self._values.at(fact.place), fact.kind, fact.place
        if isinstance(value, type) and has_own_metaclass(value):
            self._class(type(value))
        if kind in IDENTITY_KINDS and isinstance(value, type) and is_users(value):
            self._class(value)
        if value is MISSING or kind in IDENTITY_KINDS or kind == "DUPLICATE_INPUT":
            return True
        if kind in CONSTANT_KINDS:
            if _holds_changeable(value):
                return False
            return not isinstance(value, (list, set)) or self._contents(value, place)
        match kind:
            case "TYPE_MATCH":
                return self._class_of(value, place)
            case "CLOSURE_MATCH":
                if type(value) is types.FunctionType:
                    self._add(value, "__code__", place, "attribute")
                return True
            case "SEQUENCE_LENGTH":
                return isinstance(value, tuple) or self._contents(value, place)
            case "DICT_KEYS_MATCH" | "EMPTY_NN_MODULE_HOOKS_DICT" | "keys":
                return self._keys(value, place)
            case "DICT_CONTAINS" | "DICT_NOT_CONTAINS":
                return self._item(value, fact.about, place, place)
            case "SET_CONTAINS" | "SET_NOT_CONTAINS":
                return isinstance(value, frozenset) or self._contents(value, place)
            case "HASATTR":
                found = THERE if fact.expected else MISSING
                return self._attribute(value, str(fact.about), place, found)
            case "NOT_PRESENT_IN_GENERIC_DICT":
                return self._own_attribute(value, str(fact.about), place)
            case "names":
                return self._names(value, fact.about, place)  # type: ignore[arg-type]
            case "function":
                return self._function(value, fact.about, place)  # type: ignore[arg-type]
            case "registered":
                self._add(abc.ABCMeta, None, place, "token")
                return True
            case "text":
                return self._everything(value, place)
            case "requires_grad":
                self._add(value, "requires_grad", place, "attribute")
                return True
            case "tensor type":
                return True
        return False

    def _contents(self, value: object, place: Place) -> bool:
        if isinstance(value, dict):
            return self._keys(value, place)
        if isinstance(value, (list, deque)):
            self._add(value, None, place, "items")
            return True
        if isinstance(value, set):
            self._add(value, None, place, "members")
            return is_value(value)
        return False

    def _keys(self, value: object, place: Place) -> bool:
        if not isinstance(value, dict):
            return False
        self._add(value, None, place, "keys")
        return True

    def _function(self, function: object, names: frozenset[str], place: Place) -> bool:
        for name in names & OF_FUNCTIONS:
            self._add(function, name, place, "attribute")
            held = getattr(function, name, None)
            if isinstance(held, dict):
                self._keys(held, place)
        return not names - OF_FUNCTIONS or self._keys(getattr(function, "__dict__", None), place)

    def _everything(self, value: object, place: Place) -> bool:
        """Watch all that can be reached from an object; False if that can't be, or is much."""
        seen: dict[int, object] = {}
        pending = [value]
        while pending and len(seen) < _MUCH:
            each = pending.pop()
            if id(each) in seen or type(each) in _LEAVES or isinstance(each, (type, enum.Enum)):
                continue
            seen[id(each)] = each
            if isinstance(each, (dict, list, deque, set)):
                pending += each.values() if isinstance(each, dict) else each
                pending += each.keys() if isinstance(each, dict) else ()
                if not self._contents(each, place):
                    return False
            elif isinstance(each, (tuple, frozenset)):
                pending += each
            elif type(getattr(each, "__dict__", None)) is not dict or hasattr(each, "__slots__"):
                return False
            if type(getattr(each, "__dict__", None)) is dict:
                pending.append(each.__dict__)
                self._add(each, "__dict__", place, "attribute")
                self._class_of(each, place)
        return not pending

    # --- objects and classes ------------------------------------------------------------------------------

    def _class_of(self, value: object, place: Place) -> bool:
        kind = type(value)
        if isinstance(value, (torch.Tensor, type)):
            return True
        if kind.__flags__ & HEAP_TYPE:  # objects of other types keep theirs
            self._add(value, None, place, "type")
            self._class(kind)
        return True

    def _class(self, value: object) -> bool:
        if isinstance(value, type):
            self.classes[value] = None
        return isinstance(value, type)

    def _add(self, owner: object, key: object, place: Place, kind: str = "entry") -> None:
        where = (id(owner), kind, key)
        if where not in self.steps:
            path = place_text(place, known=self._texts)
            self.steps[where] = Step.of(owner, key, path, kind)


def _ends_as_a_plain_one(base: object, name: str, found: object) -> bool:
    """Whether a look-up that found this would find it in the object's own dictionary, or nothing anywhere."""
    held = getattr(base, "__dict__", {})
    if name in held:
        return found is THERE or held[name] is found
    of_class = any(name in each.__dict__ for each in type(base).__mro__)
    return found is (THERE if of_class else MISSING)


def _is_traced(descriptor: object) -> bool:
    """Whether a trace goes through a descriptor of a class, and guards what it reads."""
    return type(descriptor) is property and type(descriptor.fget) is types.FunctionType


def _leads_nowhere(before: Step, now: Step) -> bool:
    """Whether what changed leads to no other object than before: numbers or texts became others, or a dictionary has more keys behind all others."""
    if before.kind == "keys":
        (old, held), (new, holds) = (_halves(each.value) for each in (before, now))
        same_keys = len(old) <= len(new) and all(map(operator.is_, old, new))
        return same_keys and all(map(_is_no_other, held, holds))
    return before.kind in ("entry", "attribute") and _is_no_other(before.value, now.value)


def _is_no_other(before: object, now: object) -> bool:
    return before is now or (type(before) in _PLAIN and type(now) in _PLAIN)


def _halves(value: object) -> tuple[tuple[object, ...], tuple[object, ...]]:
    """The keys of a dictionary and what they hold, of what a step knows of it."""
    assert isinstance(value, tuple)
    count = len(value) // 2
    return value[:count], value[count:]


def _holds_changeable(value: object) -> bool:
    """Whether a value that is compared as a whole holds what can change without it."""
    items = value if isinstance(value, (tuple, list)) else ()
    return any(isinstance(each, (list, set)) or _holds_changeable(each) for each in items)
