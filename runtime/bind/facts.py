"""What a trace took for given. In: places in the model's Python, and what was there. Out: facts that can be looked at again, and what to say of one that changed.

A captured graph runs no Python: a number, a flag, a missing bias, the order of a dictionary is in it for good. A fact compares one of
them, by exact type and value, the way the trace looked it up. Which guards of a trace become facts is `piecework.runtime.bind.guards`'s.
"""

from __future__ import annotations

import abc
import enum
import os
import sys
import types
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from piecework.code_objects import HEAP_TYPE
from piecework.runtime.bind.asked import ANSWERS
from piecework.runtime.torch_compat import Place

MISSING = object()
#: On a ``forward`` that a layer has only while its model is traced, and that does what its own does.
MARK = "_piecework_mark"

CONSTANT_KINDS = {"CONSTANT_MATCH", "EQUALS_MATCH", "BOOL_MATCH", "NONE_MATCH"}
IDENTITY_KINDS = {
    "ID_MATCH",
    "FUNCTION_MATCH",
    "CLASS_MATCH",
    "MODULE_MATCH",
    "BUILTIN_MATCH",
    "NN_MODULE",
}
OTHER_KINDS = {
    "TYPE_MATCH",
    "CLOSURE_MATCH",
    "SEQUENCE_LENGTH",
    "DICT_KEYS_MATCH",
    "DICT_CONTAINS",
    "DICT_NOT_CONTAINS",
    "SET_CONTAINS",
    "SET_NOT_CONTAINS",
    "HASATTR",
    "NOT_PRESENT_IN_GENERIC_DICT",
    "EMPTY_NN_MODULE_HOOKS_DICT",
    "DUPLICATE_INPUT",
}
# Compared by ``==`` once the types are the same: the comparison is theirs, and complete.
_VALUES = (
    int,
    complex,
    bool,
    str,
    bytes,
    type(None),
    type(...),
    range,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
)
_SEQUENCES = (tuple, list, torch.Size)
_SETS = (set, frozenset)
_IDENTICAL = (type, enum.Enum, types.BuiltinFunctionType, types.CodeType, types.FunctionType)
CALLS = (
    "forward",
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_TABLES = ("_parameters", "_buffers", "_modules")
#: What a function has that can be set, beside its code and its own attributes.
OF_FUNCTIONS = frozenset(
    (
        *("__name__", "__qualname__", "__doc__", "__module__"),
        *("__annotations__", "__defaults__", "__kwdefaults__"),
    )
)
#: In place of names, of all that a function holds.
EVERY_NAME = "*"


def is_value(value: object) -> bool:
    """Whether `same` can compare it completely."""
    if type(value) in _SEQUENCES or type(value) in _SETS:
        return all(is_value(each) for each in value)  # type: ignore[attr-defined]
    if type(value) is slice:
        return all(is_value(each) for each in (value.start, value.stop, value.step))
    return type(value) in (*_VALUES, float) or isinstance(value, _IDENTICAL)


def has_own_metaclass(kind: type) -> bool:
    """Whether a class is made by a class of somebody's own, which its attributes may come from."""
    made_by = type(kind)
    known = ("abc", "enum", "typing", "torch")
    return bool(made_by.__flags__ & HEAP_TYPE) and made_by.__module__.partition(".")[0] not in known


def is_users(kind: type) -> bool:
    """Whether a class is made by Python code, and not by torch's."""
    return bool(kind.__flags__ & HEAP_TYPE) and kind.__module__.partition(".")[0] != "torch"


def is_its_dictionary(kind: type) -> bool:
    """Whether all that an object of this class holds is in its dictionary: only Python code makes the class and its bases, and none has slots."""
    *own, base = kind.__mro__
    return base is object and all(
        each.__flags__ & HEAP_TYPE and not each.__dict__.get("__slots__") for each in own
    )


def is_fixed(value: object) -> bool:
    """Whether it is a value that nobody can change."""
    items = value if type(value) in _SEQUENCES else ()
    return type(value) not in (list, set) and is_value(value) and all(map(is_fixed, items))  # type: ignore[call-overload]


def same(now: object, was: object) -> bool:
    """Whether two values are one to any code: equal, of equal types all the way down, NaN to NaN, and -0.0 only to -0.0."""
    if type(now) is not type(was):
        return False
    if type(now) is _Identity:
        return now.value is was.value  # type: ignore[attr-defined]
    if type(now) in (float, complex):
        return repr(now) == repr(was)
    if type(now) in _SEQUENCES:
        return len(now) == len(was) and all(map(same, now, was))  # type: ignore[arg-type, call-overload]
    if type(now) in _SETS:
        return now == was and (_all_texts(now, was) or _kinds(now) == _kinds(was))  # type: ignore[arg-type]
    if type(now) is slice:
        return same((now.start, now.stop, now.step), (was.start, was.stop, was.step))  # type: ignore[attr-defined]
    return now is was or (type(now) in _VALUES and bool(now == was))


@dataclass(frozen=True, slots=True, eq=False)
class _Identity:
    """A value that is compared as an object."""

    value: object


def _all_texts(*sets: Iterable[object]) -> bool:
    return all(type(each) is str for values in sets for each in values)


def _kinds(values: Iterable[object]) -> list[tuple[str, str]]:
    return sorted((type(each).__qualname__, repr(each)) for each in values)


def kept(value: object) -> object:
    """A copy that nobody changes."""
    if type(value) in _SEQUENCES:
        return type(value)([kept(each) for each in value])  # type: ignore[call-arg, attr-defined]
    return set(value) if type(value) is set else value  # type: ignore[call-overload]


# --- places -------------------------------------------------------------------------------------------


class Values:
    """What lies at places now.

    Args:
        starts: ``"local"`` and ``"global"`` → the variables that places start in.
    """

    def __init__(self, starts: Mapping[str, Mapping[str, object]]) -> None:
        self._starts = starts
        self._found: dict[int, object] = {}

    def at(self, place: Place) -> object:
        """The object there; `MISSING` if nothing is."""
        key = id(place)
        if key not in self._found:
            self._found[key] = self._look(place)
        return self._found[key]

    def _look(self, place: Place) -> object:
        if place.kind == "import":
            return sys.modules.get(str(place.key), MISSING)
        if place.base is None:
            return self._starts.get(place.kind, {}).get(str(place.key), MISSING)
        base = self.at(place.base)
        return MISSING if base is MISSING else look(base, place.kind, place.key)


def look(base: Any, kind: str, key: Any) -> object:
    """What one look-up finds; `MISSING` if it fails."""
    try:
        match kind:
            case "attribute":
                return getattr(base, str(key), MISSING)
            case "item" if isinstance(base, dict):
                return dict.get(base, key, MISSING)
            case "item":
                return base[key]
            case "key":
                return list(dict.keys(base))[key]
            case "at":
                return dict.get(base, list(dict.keys(base))[key], MISSING)
            case "type":
                return type(base)
            case "class dict":
                return base.__dict__
    except (LookupError, TypeError, AttributeError):
        pass
    return MISSING


def place_text(
    place: Place, names: Mapping[str, str] | None = None, known: dict[int, str] | None = None
) -> str:
    """A place as a person would write it: ``layers.0.scale``, ``options['rate']``, ``Model.rate``.

    Args:
        names: Dynamo's names of arguments → their own.
        known: texts by the identity of places, for a caller that asks for many; more are put there.
    """
    texts = {} if known is None else known
    found = texts.get(id(place))
    if found is None:
        base = "" if place.base is None else place_text(place.base, names, texts)
        own = (names or {}).get(place.name)
        found = texts[id(place)] = _text(place, base) if own is None else own
    return found


def _text(place: Place, base: str) -> str:
    if place.base is None:
        if (place.kind, place.key) == ("local", "model"):
            return ""
        text = str(place.key).removeprefix("__import_").replace("_dot_", ".")
        return "builtins" if text.startswith("__builtins_dict__") else text
    key = place.key
    match place.kind:
        case "item" if place.base.kind == "attribute" and place.base.key in _TABLES:
            return f"{base.rpartition('.')[0]}.{key}".lstrip(".")
        case "item" if place.base.kind == "class dict":
            return f"{base}.{key}"
        case "item" | "key" | "at":
            return f"{base}[{key!r}]"
        case "type":
            return f"type({base or 'model'})"
        case "class dict":
            return base
        case "attribute" if key == "cell_contents":
            return base
        case _:
            return f"{base}.{key}".lstrip(".")


# --- facts --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Fact:
    """Something at a place that the trace relied on.

    Attributes:
        place: where.
        kind: Dynamo's kind of guard; ``"requires_grad"`` or ``"tensor type"`` of a tensor, ``"answer"`` of a function of torch,
            which of some ``"keys"`` a dictionary has, or which of some ``"names"`` lead somewhere in an object; what a ``"function"`` holds
            under names, which classes are ``"registered"`` with an abstract one, the ``"text"`` of an object; variables of the
            ``"environment"``.
        about: the attribute or key that it asks for.
        expected: what was found.
        other: the place that must lead to the same object.
        of_call: whether it is about how the model itself is called; see `Facts`.
    """

    place: Place
    kind: str
    about: object
    expected: object
    other: Place | None = None
    of_call: bool = False

    @classmethod
    def of(cls, place: Place, kind: str, value: object, about: object = None) -> Fact:
        """The fact that ``value`` is at ``place``."""
        return cls(place, kind, about, expected(kind, value, about))

    def holds(self, values: Values) -> bool:
        """Whether the graph is still right about it."""
        now = values.at(self.place)
        if self.other is not None:
            return now is values.at(self.other)
        return now is not MISSING and same(_seen(self.kind, now, self.about), self.expected)

    def difference(self, values: Values, names: Mapping[str, str]) -> str:
        """What a call says when it doesn't hold."""
        path, now = place_text(self.place, names), values.at(self.place)
        then = "when the model was traced"
        way = [*self.place.path(), Place(self.place, "attribute", self.about, "")]
        called = next((each.base for each in way[1:] if each.key in CALLS), None)
        if called is not None:
            return f"module {place_text(called, names) or 'model'} has another forward, or other forward hooks, than {then}"
        if now is MISSING:
            return f"{path} was {shown(self.expected)} {then} and is gone now"
        seen = _seen(self.kind, now, self.about)
        match self.kind:
            case "TYPE_MATCH":
                what = (
                    "module " if issubclass(self.expected, torch.nn.Module) else ""  # type: ignore[arg-type]
                )
                was, now_is = _name(self.expected), _name(seen)
                if was == now_is:  # of two modules
                    was, now_is = (f"{each.__module__}.{_name(each)}" for each in (self.expected, seen))  # type: ignore[attr-defined]
                return f"{what}{path or 'model'} was a {was} {then} and is a {now_is} now"
            case "tensor type" | "requires_grad":
                return f"{path} had {self.kind} {shown(self.expected)} {then} and has {shown(seen)} now, which its code looks at"
            case "keys" | "names":
                other = next(iter(seen ^ self.expected))  # type: ignore[operator]
                was, is_now = ("" if other in each else "not " for each in (self.expected, seen))  # type: ignore[operator]
                return f"{other!r} was {was}in {path or 'the model'} {then}, and is {is_now}now, and the code goes on without it"
            case "answer":
                return f"{path}, which the model's code asks, answered {shown(self.expected)} {then} and answers {shown(seen)} now"
            case "function":
                return f"function {path} has other attributes than {then}, which the model's code asks functions for"
            case "registered":
                return f"other classes are registered with {path} than {then}"
            case "environment":
                pairs = zip(self.expected[::2], self.expected[1::2], seen[1::2], strict=True)  # type: ignore[index]
                other = next(name for name, was, is_now in pairs if was != is_now)
                return f"the environment variable {other} was set otherwise {then}, which its code asks for"
            case "text":
                return f"str({path}) gave {shown(self.expected)} {then} and gives {shown(seen)} now"
            case "TENSOR_MATCH":
                return f"tensor {path} was {shown(self.expected)} {then} and is {shown(seen)} now"
            case "SEQUENCE_LENGTH" | "EMPTY_NN_MODULE_HOOKS_DICT":
                return f"{path} had {self.expected[1]} items {then} and is a {type(now).__qualname__} of {_length(now)} now"  # type: ignore[index]
            case "DICT_KEYS_MATCH":
                return f"{path} had the keys {shown(self.expected[1:])} {then} and has {shown(seen[1:])} now"  # type: ignore[index]
            case "DICT_CONTAINS" | "DICT_NOT_CONTAINS" | "SET_CONTAINS" | "SET_NOT_CONTAINS":
                return f"{self.about!r} was{'' if self.expected else ' not'} in {path} {then}, and is{'' if seen else ' not'} now"
            case "HASATTR" | "NOT_PRESENT_IN_GENERIC_DICT":
                where = f"{path}.{self.about}".lstrip(".")
                return f"{where} was{'' if self.expected else ' not'} set {then}, and is{'' if seen else ' not'} now"
            case "DUPLICATE_INPUT" if self.other is not None:
                return f"{path} and {place_text(self.other, names)} were one object {then} and are two now"
        if self.kind in CONSTANT_KINDS:
            return f"{path} was {shown(self.expected)} {then} and is {shown(now)} now"
        return f"{path} was {shown(self.expected)} {then} and is another now"


def _seen(kind: str, now: Any, about: Any) -> object:
    """What a fact of this kind compares."""
    match kind:
        case "TYPE_MATCH" | "tensor type":
            return type(now)
        case "requires_grad":
            return getattr(now, "requires_grad", MISSING)
        case "keys":
            held = now if isinstance(now, dict) else {}
            return frozenset(key for key in held if type(key) is not str or key in about)
        case "names":
            return about & _names_of(now)
        case "function":
            return _held_by(now, about) if type(now) is types.FunctionType else MISSING
        case "registered":
            found = registered_with(now) if isinstance(now, abc.ABCMeta) else ()
            return found if about is None else tuple(each for each in found if each in about)
        case "text":
            return str(now)
        case "environment":
            return [each for name in sorted(about) for each in (name, os.environ.get(name))]
        case "answer":
            return ANSWERS[id(now)]() if id(now) in ANSWERS else MISSING
        case "CLOSURE_MATCH":
            return now.__code__ if type(now) is types.FunctionType else _Identity(now)
        case "SEQUENCE_LENGTH" | "EMPTY_NN_MODULE_HOOKS_DICT":
            return ("dict" if isinstance(now, dict) else type(now), _length(now))
        case "DICT_KEYS_MATCH":
            keys = keys_of(now) if isinstance(now, dict) else []
            return [type(now) is dict, *(key if is_value(key) else _Identity(key) for key in keys)]
        case "DICT_CONTAINS" | "DICT_NOT_CONTAINS":
            return isinstance(now, (dict, types.MappingProxyType)) and about in now
        case "SET_CONTAINS" | "SET_NOT_CONTAINS":
            return isinstance(now, (set, frozenset)) and about in now
        case "HASATTR":
            return hasattr(now, str(about))
        case "TENSOR_MATCH":
            return _metadata(now)
        case "NOT_PRESENT_IN_GENERIC_DICT":
            held = getattr(now, "__dict__", {})
            return about in held and not hasattr(held[about], MARK)
    return _Identity(now) if kind in IDENTITY_KINDS else now


def _names_of(value: Any) -> set[str]:
    """What leads somewhere in an object, a class or a module, without running anything of it."""
    held = getattr(value, "__dict__", {})
    kind = value if isinstance(value, type) else type(value)
    tables = [held[table] for table in _TABLES if isinstance(held.get(table), dict)]
    return set(held).union(*tables, *map(vars, kind.__mro__))


def _held_by(function: types.FunctionType, names: frozenset[str]) -> list[object]:
    """What a function has under some names, each name before what it has."""
    found: dict[str, object] = {}
    for name in sorted(names & OF_FUNCTIONS):
        value = getattr(function, name, None)
        if isinstance(value, dict):
            found[name] = tuple(f"{key}: {each!r}" for key, each in value.items())
        else:
            found[name] = value
    for name, value in function.__dict__.items():
        of_torch = name.startswith("_torchdynamo")
        if name in names or (EVERY_NAME in names and not of_torch):
            found[name] = value
    pairs = ((name, each if is_fixed(each) else _Identity(each)) for name, each in found.items())
    return [each for pair in pairs for each in pair]


def registered_with(kind: abc.ABCMeta) -> tuple[str, ...]:
    """The names of classes that were registered with an abstract class, with those under it, or with those that were; a name of several as often."""
    found: list[str] = []
    seen: set[type] = set()
    pending: list[type] = [kind]
    while pending:
        each = pending.pop()
        if each in seen or not isinstance(each, abc.ABCMeta):
            continue
        seen.add(each)
        registered = [one for ref in abc._get_dump(each)[0] if (one := ref()) is not None]  # type: ignore[attr-defined]
        found += map(class_name, registered)
        pending += [*registered, *type.__subclasses__(each)]
    return tuple(sorted(found))


def class_name(kind: type) -> str:
    """A class's name with its module's."""
    return f"{kind.__module__}.{kind.__qualname__}"


def keys_of(value: dict[Any, Any]) -> list[object]:
    """The keys of a dictionary in its order; an OrderedDict has an order of its own."""
    return list(OrderedDict.keys(value) if isinstance(value, OrderedDict) else dict.keys(value))


def _metadata(value: object) -> object:
    if not isinstance(value, torch.Tensor):
        return None
    strides = value.stride() if value.layout is torch.strided else None
    kind = (type(value), value.dtype, value.layout, value.device)
    return (*kind, value.shape, strides)


def _length(value: object) -> int:
    return len(value) if hasattr(value, "__len__") else -1  # type: ignore[arg-type]


def _name(kind: object) -> str:
    return getattr(kind, "__qualname__", str(kind))


def shown(value: object) -> str:
    """A value in one short line."""
    if type(value) is _Identity:
        value = value.value
    if isinstance(value, type):
        return value.__qualname__
    if isinstance(value, list):
        return "[" + ", ".join(map(shown, value)) + "]"
    text = "nothing" if value is MISSING else repr(value)
    return text if len(text) < 100 and "\n" not in text else f"a {type(value).__qualname__}"


def expected(kind: str, value: object, about: object) -> object:
    """What a fact of this kind remembers of ``value``, which nobody changes."""
    return kept(_seen(kind, value, about))
