"""The plain values that a trace read, as places and texts that another process compares."""

import enum
import importlib
import sys
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket

from piecework.runtime.store.digest import digest_of
from piecework.runtime.torch_compat import Guarded, Place
from piecework.runtime.watch.places import MISSING, PLAIN_KEYS, LookUps, place_text, portable

_PLAIN = (int, bool, float, complex, str, bytes, type(None), type(...), range)
_OF_TORCH = (torch.dtype, torch.device, torch.layout, torch.memory_format)
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType)
_NAMED = (type, types.CodeType, *_FUNCTIONS)
_OF_C = (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType)
_KEYED = (dict, set, frozenset, types.MappingProxyType)
_OPERATORS = (OpOverload, OpOverloadPacket, HigherOrderOperator)
_LIBRARIES = {"torch", "piecework", *sys.stdlib_module_names}
ONE_OBJECT = "were one object"


class Untellable(ValueError):
    """A value that another process could not compare; the text says what it is."""


@dataclass(frozen=True, slots=True)
class PlainValue:
    """What was at one place."""

    guard: Guarded  # what Dynamo guards there, at places that another process can look up
    text: str  # what was seen

    def difference(self, now: LookUps, names: Mapping[str, str] | None = None) -> str:
        """How what lies there differs; "" if it doesn't."""
        path, text = place_text(self.guard.place, names) or "the model", _seen(self.guard, now)
        if text == self.text:
            return ""
        if self.guard.other:
            return f"{path} and {place_text(self.guard.other, names)} {ONE_OBJECT} and are two now"
        if self.guard.about is not None:
            path = f"{place_text((*self.guard.place, ('attribute', self.guard.about)), names)}"
        return f"{path} was {self.text} when the model was traced and is {text} now"


def plain_values(
    guards: Iterable[Guarded], now: LookUps
) -> tuple[tuple[PlainValue, ...], tuple[str, ...]]:
    """The plain values behind guards, and what of them only this process can compare."""
    found: dict[PlainValue, None] = {}
    untold = []
    for guard in guards:
        librarys = _is_librarys(guard.place, now)
        if guard.kind == "TENSOR_MATCH" or (librarys and not _is_function_of_module(guard, now)):
            continue
        places = [portable(each, now) for each in guard.places]
        try:
            if not all(places) or type(guard.about) not in PLAIN_KEYS:
                raise Untellable("what another process could not look up")
            told = Guarded(places[0], guard.kind, guard.about, *places[1:])
            found[PlainValue(told, _text(guard, now))] = None
        except Untellable as error:
            if not librarys:
                untold.append(f"{place_text(guard.place) or 'the model'} ({guard.kind}): {error}")
    return tuple(found), tuple(untold)


def import_starts(values: Iterable[PlainValue]) -> None:
    """Import the modules that ``values`` start in."""
    for kind, key in {place[0] for value in values for place in value.guard.places}:
        if kind in ("import", "object"):
            importlib.import_module(str(key).partition(":")[0])


def _is_librarys(place: Place, now: LookUps) -> bool:
    """Whether a place is inside Python, torch or piecework."""
    if str(place[0][1]).startswith("__builtins_dict__"):
        return True
    ways = (place[:n] for n in range(1, max(2, len(place))))
    return any(_library_of(now.at(way)) in _LIBRARIES for way in ways)


def _library_of(value: object) -> str:
    """The package that a module, its variables, or a function is of; "" for anything else."""
    name: object = ""
    if type(value) is dict:  # the variables of a function: a module's, or those of a named tuple
        module = sys.modules.get(str(value.get("__name__")))
        is_scope = getattr(module, "__dict__", None) is value
        name = "sys" if "_tuple_new" in value else is_scope and value["__name__"]
    elif isinstance(value, types.ModuleType):
        name = value.__name__
    elif isinstance(value, types.FunctionType):
        name = value.__module__
    return str(name or "").partition(".")[0]


def _is_function_of_module(guard: Guarded, now: LookUps) -> bool:
    """Whether it is about a function in a module, which people replace by their own."""
    holder = now.at(guard.place[:-1]) if len(guard.place) > 1 else None
    is_module = isinstance(holder, types.ModuleType) and _library_of(holder) != "piecework"
    return is_module and isinstance(now.at(guard.place), _FUNCTIONS)


def _seen(guard: Guarded, now: LookUps) -> str:
    try:
        return _text(guard, now)
    except Exception as error:  # noqa: BLE001 - of another kind than it was, it may raise anything
        return str(error)


def _text(guard: Guarded, now: LookUps) -> str:
    """What a guard compares, as a text."""
    value, about = now.at(guard.place), guard.about
    if guard.other:
        return "one object" if value is not MISSING and value is now.at(guard.other) else "two"
    if value is MISSING:
        if guard.place[-1][0] == "static":
            return "missing"
        raise Untellable("not there")
    if about is not None:
        if guard.kind == "NOT_PRESENT_IN_GENERIC_DICT":
            value = vars(value)
        is_there = about in value if isinstance(value, _KEYED) else hasattr(value, str(about))
        return "there" if is_there else "missing"
    if guard.kind == "TYPE_MATCH":
        return class_name(type(value))
    if isinstance(value, dict):
        return f"[{', '.join(map(plain_text, dict.keys(value)))}]"
    return f"{len(value)} items" if guard.kind == "SEQUENCE_LENGTH" else plain_text(value)


def plain_text(value: Any) -> str:
    """A text that is equal where values are, type by type; of a function it says what it runs."""
    kind = type(value)
    if kind in _PLAIN:
        return repr(value)
    if kind in _OF_TORCH:
        return f"device {value}" if kind is torch.device else str(value)
    if kind in (tuple, list, torch.Size):
        return f"{kind.__name__}({', '.join(map(plain_text, value))})"
    if kind in (set, frozenset):
        return f"{kind.__name__}({', '.join(sorted(map(plain_text, value)))})"
    if kind is slice:
        return f"slice{plain_text((value.start, value.stop, value.step))}"
    if isinstance(value, enum.Enum):
        return f"{class_name(kind)}.{value.name} {plain_text(value.value)}"
    if isinstance(value, types.ModuleType):
        return f"module {value.__name__}"
    if isinstance(value, type):
        return f"class {class_name(value)}"
    if isinstance(value, types.FunctionType):
        return f"function {value.__module__}.{value.__qualname__} {code_digest(value.__code__)}"
    if isinstance(value, types.CodeType):
        return f"code {code_digest(value)}"
    if isinstance(value, _OF_C):
        return f"builtin {value.__qualname__}"
    if isinstance(value, _OPERATORS):
        return f"operator {value}"
    if isinstance(value, property):
        return f"property {plain_text(value.fget)}"
    if isinstance(value, (staticmethod, classmethod)):
        return f"{kind.__name__} {plain_text(value.__func__)}"
    raise Untellable(f"a {class_name(kind)}, which can be told by identity alone")


def is_fixed(value: object) -> bool:
    """Whether nobody can change the value: a number, text, class, function, tuple of such."""
    if type(value) in (tuple, torch.Size, frozenset):
        return all(map(is_fixed, value))  # type: ignore[call-overload]
    if type(value) is slice:
        return all(map(is_fixed, (value.start, value.stop, value.step)))
    return type(value) in (*_PLAIN, *_OF_TORCH) or isinstance(value, (enum.Enum, *_NAMED))


def class_name(kind: type) -> str:
    """A class's name with its module's."""
    return f"{kind.__module__}.{kind.__qualname__}"


def code_digest(code: types.CodeType) -> str:
    """A digest of what code runs; lines and files don't count."""
    return digest_of(code, "code")[:32]
