"""The guards of a trace, each in one bin. In: Dynamo's guards and the values behind them. Out: facts about the model, facts about arguments, tensors, and what only Dynamo's own check can compare.

The bins are allow-lists: a guard of a kind, or on a place, that is not known here is left to Dynamo, which then looks in every call. No
guard is dropped but those on what `ELSEWHERE` names, each with its reason, and those on values that the emitted ``check_inputs`` compares.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.utils import _pytree as pytree

from piecework.code_objects import HEAP_TYPE
from piecework.runtime import torch_compat
from piecework.runtime.bind.asked import (
    ANSWERS,
    asks_grad_mode,
    compares_identity,
    is_torchs,
    may_ask,
    names_in,
    texts_in,
    tried_in,
)
from piecework.runtime.bind.facts import (
    CALLS,
    CONSTANT_KINDS,
    IDENTITY_KINDS,
    MISSING,
    OTHER_KINDS,
    Fact,
    Values,
    expected,
    has_own_metaclass,
    is_users,
    is_value,
    place_text,
)
from piecework.runtime.bind.unguarded import Unguarded, protocol_names
from piecework.runtime.torch_compat import Guarded, Place

_SAID_OF_CLASSES = ("__name__", "__doc__", "__module__")
#: Guards on the process and on sizes: nothing is lost without them, for the reason given.
ELSEWHERE = {
    "SHAPE_ENV": "sizes and integers of arguments are compared by the emitted check_inputs",
    "GRAD_MODE": "the entry runs with it off, as the trace did",
    "GLOBAL_STATE": "autocast and grad mode are the entry's, the default dtype is compared beside the facts, the rest acts at run time",
    "DETERMINISTIC_ALGORITHMS": "operators read it when they run",
    "TORCH_FUNCTION_STATE": "the entry goes another way under a function mode",
    "DEFAULT_DEVICE": "it is a function mode, which the entry sees",
    "FSDP_TRAINING_STATE": "a captured graph shards nothing",
    "AUTOGRAD_SAVED_TENSORS_HOOKS": "nothing is saved for a backward pass",
    "FUNCTORCH_STACK_MATCH": "the entry refuses calls under a transform",
    "DUAL_LEVEL": "the entry refuses forward-mode differentiation",
}
# Types of arguments that the emitted check compares by itself, by exact type.
_EMITTED = (int, float, bool, str, bytes, complex, type(None), list, tuple, dict)
_MAPPINGS = (dict, types.MappingProxyType)  # a class's dictionary is behind a proxy
_CONTAINERS = (list, tuple, dict)
_GRADIENT_NAMES = {"requires_grad", "is_leaf", "grad_fn", "retains_grad"}


@dataclass(slots=True)
class Bins:
    """Where each guard went.

    Attributes:
        facts: about the model, its globals and what they lead to.
        argument_facts: about arguments, beyond what ``check_inputs`` compares.
        tensors: what the trace knew of the model's tensors, by place.
        left: guards that only Dynamo can compare.
        asks_grad_mode: the model's code asks whether gradients are recorded.
    """

    facts: list[Fact] = field(default_factory=list)
    argument_facts: list[Fact] = field(default_factory=list)
    tensors: list[tuple[Place, torch.Tensor]] = field(default_factory=list)
    left: list[Guarded] = field(default_factory=list)
    asks_grad_mode: bool = False

    @property
    def left_on_arguments(self) -> bool:
        """Whether Dynamo must see the arguments of a call."""
        return any(is_argument(place) for each in self.left for place in _places(each))


def sort_guards(
    guards: Sequence[Guarded],
    values: Values,
    arguments: object,
    code: Iterable[types.CodeType],
    ordered: frozenset[str] | None,
) -> Bins:
    """Put each of ``guards`` into its bin.

    Args:
        values: what is at places, during the trace.
        arguments: the example call's, all of them.
        code: what the trace went through.
        ordered: Dynamo's names of dictionaries whose order matters; None if that is not known.
    """
    return _Sorter(guards, values, arguments, code, ordered).bins


def misread(guards: Iterable[Guarded], values: Values) -> str:
    """What the trace took from a class, where a look-up of the class's own finds nothing; "" if there is no such thing.

    Behind a ``__getattribute__`` that raises, Dynamo looks in the class, as Python does not.
    """
    for place in every_place(guards):
        owner = _owner_of_class(place)
        base = MISSING if owner is None else values.at(owner)
        if base is not MISSING and _only_plainly_there(base, str(place.key)):
            return place_text(Place(owner, "attribute", place.key, ""))
    return ""


def every_place(guards: Iterable[Guarded]) -> Iterator[Place]:
    """Each place that guards are about, and each on the way to one, once."""
    seen: set[Place] = set()
    for guard in guards:
        place: Place | None = guard.place
        while place is not None and place not in seen:
            seen.add(place)
            yield place
            place = place.base


def _owner_of_class(place: Place) -> Place | None:
    """The object whose class's dictionary a place is in."""
    held = place.base
    if place.kind != "item" or held is None or held.kind != "class dict":
        return None
    kind = held.base
    while kind is not None and kind.kind != "type":
        kind = kind.base
    return None if kind is None else kind.base


def _only_plainly_there(base: object, name: str) -> bool:
    """Whether the look-up that each object has would find something, and this one's own does not."""
    if type(base).__getattribute__ is object.__getattribute__ or hasattr(base, name):
        return False
    try:
        object.__getattribute__(base, name)
    except AttributeError:
        return False
    return True


def is_argument(place: Place) -> bool:
    """Whether a place is in the call's arguments."""
    start = place.path()[0]
    return start.kind == "local" and start.key in ("args", "kwargs")


def _places(guard: Guarded) -> list[Place]:
    return [guard.place] if guard.other is None else [guard.place, guard.other]


class _Sorter:
    def __init__(
        self,
        guards: Sequence[Guarded],
        values: Values,
        arguments: object,
        code: Iterable[types.CodeType],
        ordered: frozenset[str] | None,
    ) -> None:
        self.bins = Bins(asks_grad_mode=asks_grad_mode(code) or any(map(_is_grad_mode, guards)))
        self._values = values
        self._ordered = ordered
        self._leaves = {id(leaf) for leaf in pytree.tree_leaves(arguments)}
        names = {name for each in code if not is_torchs(each) for name in each.co_names}
        self._gradients = bool(names & _GRADIENT_NAMES)
        # Names that code may ask an object's dictionary for: Dynamo does not guard that they are missing.
        readers = [each for each in code if {"__dict__", "vars", "dir"} & set(each.co_names)]
        texts = {text for each in readers for text in each.co_consts if type(text) is str}
        self._asked = {text for text in texts if text.isidentifier()}
        named = {id(each.value) for each in guards if each.known}
        self._read = names_in(code)
        self._types = "__class__" in names or bool(named & {id(torch.nn.Parameter), id(type)})
        self._noted: set[Place] = set()
        self._tried = tried_in(code)
        self._texts = texts_in(code)
        self._identity = compares_identity(code)
        looked = [values.at(each.place) for each in guards]
        self._tried |= protocol_names(looked)
        read = [each.value for each in guards if each.known and type(each.value) is str]
        self._unguarded = Unguarded(code, read, self._tried, looked)
        told = [each for each in guards if each.kind not in ELSEWHERE]
        for each in told:
            self._sort(each)
        self._keys_of(told)

    def _sort(self, guard: Guarded) -> None:
        on_argument = any(map(is_argument, _places(guard)))
        if self._is_emitted(guard) or _on_growth(guard):
            return
        if guard.kind == "TENSOR_MATCH":
            self._tensor(guard, on_argument)
            return
        if guard.kind == "DICT_KEYS_MATCH" and self._is_asked_by_name(guard.place):
            return  # `_keys_of` says which names it was asked for
        if not on_argument and self._is_one_value(guard):
            value = self._values.at(guard.place)
            for place in _places(guard):
                self.bins.facts.append(Fact.of(place, "CONSTANT_MATCH", value))
            return
        fact = self._fact(guard)
        if fact is None:
            self.bins.left.append(guard)
        else:
            facts = self.bins.argument_facts if on_argument else self.bins.facts
            facts.append(fact)
            if guard.known and id(guard.value) in ANSWERS:
                self.bins.facts.append(Fact.of(guard.place, "answer", guard.value))
            for each in guard.place.path():
                self._attributes_of(each, facts)
            if guard.kind == "NOT_PRESENT_IN_GENERIC_DICT":
                value = self._values.at(guard.place)
                facts += self._unguarded.of_method(value, str(guard.about), guard.place)

    def _is_one_value(self, guard: Guarded) -> bool:
        """Whether a guard that two places lead to one object says no more than that both hold one value; Dynamo looked at it in one of them."""
        if guard.kind != "DUPLICATE_INPUT" or guard.other is None or self._identity:
            return False
        values = [self._values.at(place) for place in _places(guard)]
        known = all(each.kind != "unknown" for place in _places(guard) for each in place.path())
        return known and values[0] is values[1] and type(values[0]) is list and is_value(values[0])

    def _is_emitted(self, guard: Guarded) -> bool:
        """Whether ``check_inputs`` compares what this guards."""
        if not all(map(is_argument, _places(guard))):
            return False
        if guard.kind == "DUPLICATE_INPUT":
            return all(id(self._values.at(place)) in self._leaves for place in _places(guard))
        if type(self._values.at(guard.place)) not in _EMITTED:
            return False
        *way, _ = guard.place.path()
        plain = all(type(self._values.at(place)) in _CONTAINERS for place in way)
        if guard.kind == "DICT_KEYS_MATCH" and guard.place.base is not None:
            # check_inputs compares keys and leaves their order alone.
            return plain and self._ordered is not None and guard.place.name not in self._ordered
        return plain and (guard.kind in CONSTANT_KINDS or guard.kind in OTHER_KINDS)

    def _attributes_of(self, place: Place, facts: list[Fact]) -> None:
        """Note which attributes an object has where Dynamo leaves out that it lacks some.

        It does for classes that compute what their objects lack, and where code reads ``__dict__`` or ``vars()``.
        """
        value = self._values.at(place)
        if place in self._noted or isinstance(value, torch.Tensor):
            return
        self._noted.add(place)
        self._methods_of(value, place, facts)
        facts += self._unguarded.facts(value, place)
        named = isinstance(value, type) or _is_complete(value)
        tried = self._tried
        if type(value) is types.ModuleType:
            tried |= self._unguarded.of_modules
        if tried and (named or type(value).__flags__ & HEAP_TYPE):
            facts.append(Fact.of(place, "names", value, tried))
        if isinstance(value, type):
            if not torch_compat.GUARDS_CLASS_VALUES:
                self._values_of(value, place, facts)
            if has_own_metaclass(value):
                made_by = Place(place, "type", None, f"type({place.name})")
                self._values_of(type(value), made_by, facts)
            return
        own = getattr(value, "__dict__", None)
        if type(own) is not dict or isinstance(value, (dict, list, set, types.ModuleType)):
            return
        for name in self._asked - own.keys():
            facts.append(Fact(place, "NOT_PRESENT_IN_GENERIC_DICT", name, False))
        if hasattr(value, "__getattr__") and not isinstance(value, torch.nn.Module):
            held = Place(place, "attribute", "__dict__", f"{place.name}.__dict__")
            facts.append(Fact.of(held, "DICT_KEYS_MATCH", own))

    def _methods_of(self, value: object, place: Place, facts: list[Fact]) -> None:
        """Note methods of built-in classes that an object or a container holds, such as ``torch.Tensor.relu``: Dynamo guards none."""
        kind, held = "item", value
        if isinstance(value, (list, tuple)):
            held = dict(enumerate(value))
        elif not isinstance(value, dict):
            kind, held = "attribute", getattr(value, "__dict__", None)
        for key, each in list(held.items()) if isinstance(held, dict) else ():
            # What else lies there is not asked for its class: torch.distributed has something that warns then.
            if issubclass(type(each.func if type(each) is partial else each), _METHODS):
                name = f"{place.name}[{key!r}]" if kind == "item" else f"{place.name}.{key}"
                facts.append(Fact.of(Place(place, kind, key, name), "ID_MATCH", each))

    def _keys_of(self, guards: Sequence[Guarded]) -> None:
        """Note the keys of dictionaries whose order counts, of which Dynamo says no more than the type, or which may have been asked in vain."""
        texts = {each.value for each in guards if each.known and type(each.value) is str}
        tried = self._tried.union(texts)
        asked = tried | self._texts
        told: dict[str, set[str]] = {}
        read: dict[str, set[object]] = {}
        places: dict[str, Place] = {}
        for guard in guards:
            for place in _places(guard):
                told.setdefault(place.name, set()).add(guard.kind)
                for each in place.path():
                    places.setdefault(each.name, each)
                    if each.base is not None:
                        told.setdefault(each.base.name, set()).add("content")
                    if each.base is not None and each.kind == "item":
                        read.setdefault(each.base.name, set()).add(each.key)
        for name, place in places.items():
            value, base = self._values.at(place), place.base
            if not isinstance(value, dict) or base is None or place.key in _NOT_THEIRS:
                continue
            owner = self._values.at(base)
            of_torch = isinstance(owner, types.ModuleType) and owner.__name__.startswith("torch.")
            if of_torch or _is_registry(value):
                continue
            facts = self.bins.argument_facts if is_argument(place) else self.bins.facts
            if self._is_asked_by_name(place):
                facts.append(Fact.of(place, "keys", value, asked))
                continue
            alone = told.get(name) == {"TYPE_MATCH"} or self._as_a_whole(value, read.get(name))
            if name in (self._ordered or ()) or alone:
                facts.append(Fact.of(place, "DICT_KEYS_MATCH", value))
            elif self._tried and all(map(is_value, value)):
                facts.append(Fact.of(place, "keys", value, tried))

    def _is_asked_by_name(self, place: Place) -> bool:
        """Whether it is a table of transformers' implementations (of attention, of masks), which others register theirs in."""
        value = self._values.at(place)
        owner = None if place.base is None else self._values.at(place.base)
        kind = getattr(sys.modules.get("transformers.utils.generic"), "GeneralInterface", None)
        if kind is None or self._ordered is None or place.name in self._ordered:
            return False
        tables = [each.__dict__.get("_global_mapping") for each in kind.__subclasses__()]
        of_one = isinstance(owner, kind) and owner.__dict__.get("_local_mapping") is value
        return of_one or any(value is each for each in tables)

    def _as_a_whole(self, value: dict[object, object], read: set[object] | None) -> bool:
        """Whether code read every item of a dictionary, and not by keys that are written there: what it makes of it may have their order."""
        return bool(value) and read == value.keys() and not self._texts.issuperset(value)

    def _values_of(self, kind: type, place: Place, facts: list[Fact]) -> None:
        """Note the plain values of a class that code may read of the class itself."""
        if any(each.kind in ("key", "at") for each in place.path()):
            return  # an entry of a table, which is found by its number there
        found: dict[str, object] = {}
        for base in kind.__mro__:
            if is_users(base):
                found = {**vars(base), **found}
        found = {name: value for name, value in found.items() if not name.startswith("__")}
        found |= {name: getattr(kind, name, None) for name in _SAID_OF_CLASSES}
        for name, value in found.items():
            if may_ask(self._read, name) and _is_plain(value):
                here = Place(place, "attribute", name, f"{place.name}.{name}")
                facts.append(Fact.of(here, "CONSTANT_MATCH", value))

    def _tensor(self, guard: Guarded, on_argument: bool) -> None:
        tensor = self._values.at(guard.place)
        if not isinstance(tensor, torch.Tensor) or tensor is not guard.value:
            self.bins.left.append(guard)
            return
        if on_argument:
            if id(tensor) not in self._leaves:  # in an object that pytree does not see into
                self.bins.left.append(guard)
            return
        for kind, wanted in (("requires_grad", self._gradients), ("tensor type", self._types)):
            if wanted:
                self.bins.facts.append(Fact.of(guard.place, kind, tensor))
        self.bins.tensors.append((guard.place, tensor))

    def _fact(self, guard: Guarded) -> Fact | None:
        """The guard as a fact; None if it can't be one."""
        value = self._values.at(guard.place)
        if any(each.kind == "unknown" for place in _places(guard) for each in place.path()):
            return None
        if value is MISSING or (guard.known and not _one(value, guard.value)):
            return None
        kind, about, other = guard.kind, guard.about, guard.other
        if kind in CONSTANT_KINDS:
            if not is_value(value):
                return None
        elif kind == "DUPLICATE_INPUT":
            if other is None or self._values.at(other) is not value:
                return None
        elif kind not in IDENTITY_KINDS and kind not in OTHER_KINDS:
            return None
        if kind in _MEANT and not _MEANT[kind](value, about):
            return None
        return Fact(guard.place, kind, about, expected(kind, value, about), other, _of_call(guard))


# Dictionaries of modules that have facts of their own, or that watching a module watches.
_NOT_THEIRS = (*CALLS, "_parameters", "_buffers", "_modules", "__dict__")
_METHODS = (
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    types.MethodWrapperType,
    types.ClassMethodDescriptorType,
)
# What a class holds as code, which others watch.
_CODE = (type, types.FunctionType, types.BuiltinFunctionType, types.CodeType)
#: What a guard of the kind says. One that says something else to us than to Dynamo is left to Dynamo.
_MEANT: dict[str, Callable[[Any, Any], bool]] = {
    "DICT_KEYS_MATCH": lambda value, about: isinstance(value, dict),
    "DICT_CONTAINS": lambda value, about: isinstance(value, _MAPPINGS) and about in value,
    "DICT_NOT_CONTAINS": lambda value, about: isinstance(value, _MAPPINGS) and about not in value,
    "SET_CONTAINS": lambda value, about: isinstance(value, (set, frozenset)) and about in value,
    "SET_NOT_CONTAINS": lambda value, about: isinstance(value, (set, frozenset))
    and about not in value,
    "NOT_PRESENT_IN_GENERIC_DICT": lambda value, about: about not in value.__dict__,
    "EMPTY_NN_MODULE_HOOKS_DICT": lambda value, about: isinstance(value, dict),
    "SEQUENCE_LENGTH": lambda value, about: hasattr(type(value), "__len__"),
}


def _is_grad_mode(guard: Guarded) -> bool:
    """Whether it is on torch's own question for the grad mode, under a name of the model's."""
    asked = torch.is_grad_enabled
    return guard.known and guard.value is asked and guard.place.key != asked.__name__


def _is_complete(value: object) -> bool:
    """Whether it is a module of Python to which nothing is added when it is asked for, or when a part of torch is imported."""
    return (
        type(value) is types.ModuleType
        and "__getattr__" not in vars(value)
        and value.__name__.partition(".")[0] != "torch"
    )


def _is_plain(value: object) -> bool:
    return is_value(value) and not isinstance(value, _CODE)


def _one(value: object, guarded: object) -> bool:
    """Whether a look-up found what Dynamo's did; some objects are made anew by each look-up."""
    fresh = isinstance(value, (types.MethodType, types.MappingProxyType))
    return value is guarded or (type(value) is type(guarded) and is_value(value)) or fresh


def _is_registry(value: object) -> bool:
    """Whether it is a table of classes that grows: pytree's, or transformers', which notes those of each model that is built, in any order."""
    capturing = sys.modules.get("transformers.utils.output_capturing")
    noted = getattr(capturing, "_CAN_RECORD_REGISTRY", MISSING)
    return value is noted or value is pytree.SUPPORTED_NODES


def _on_growth(guard: Guarded) -> bool:
    """Whether it is on a registry as a whole. What pytree's holds never changes; what is noted of this model's classes is compared."""
    if not guard.known or not _is_registry(guard.value):
        return False
    return guard.kind == "SEQUENCE_LENGTH" or guard.value is pytree.SUPPORTED_NODES


def _of_call(guard: Guarded) -> bool:
    """Whether it is about how the model itself is called: its own ``forward`` and hooks."""
    path = guard.place.path()
    if (path[0].kind, path[0].key) != ("local", "model"):
        return False
    first = path[1].key if len(path) > 1 else guard.about
    return first in CALLS
