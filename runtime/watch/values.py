"""The plain values that a trace read, told so that another process can compare them.

Each guard of Dynamo's becomes a path from the model, its arguments or an imported module, and a text of what was there: a number, the name of a class, a length,
the keys of a dictionary. Two processes agree where the texts are equal.
"""

from __future__ import annotations

import enum
import importlib
import sys
import types
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket

from piecework.runtime.store.digest import digest_of
from piecework.runtime.torch_compat import Guarded, Place
from piecework.runtime.watch.places import MISSING, LookUps, imported, place_text

Step = tuple[str, object]
"""One look-up of a path: its kind, as in `Place`, and its key."""
Path = tuple[Step, ...]

_PLAIN = (int, bool, float, complex, str, bytes, type(None), type(...), range)
_OF_TORCH = (torch.dtype, torch.device, torch.layout, torch.memory_format)
_SEQUENCES = (tuple, list, torch.Size)
_NAMED = (type, types.BuiltinFunctionType, types.CodeType, types.FunctionType)
_KEYS = (str, int, bool, type(None))
CONSTANTS = {"CONSTANT_MATCH", "EQUALS_MATCH", "BOOL_MATCH", "NONE_MATCH"}
OBJECTS = {
    "ID_MATCH",
    "FUNCTION_MATCH",
    "CLASS_MATCH",
    "MODULE_MATCH",
    "BUILTIN_MATCH",
    "NN_MODULE",
    "CLOSURE_MATCH",
}
_TABLES = [("attribute", name) for name in ("_parameters", "_buffers", "_modules")]
_ATTRIBUTES = {"HASATTR", "NOT_PRESENT_IN_GENERIC_DICT"}
_CONTAINS = {"DICT_CONTAINS", "DICT_NOT_CONTAINS", "SET_CONTAINS", "SET_NOT_CONTAINS"}


class Untellable(ValueError):
    """A value that another process could not compare; the text says what it is."""


@dataclass(frozen=True, slots=True)
class PlainValue:
    """What was at one place.

    Attributes:
        path: the look-ups that lead there; the first is ``("local", "model")``, ``("local", "args")``, ``("local", "kwargs")``,
            ``("import", module)`` or ``("object", "module:name")``.
        kind: Dynamo's name of the kind of guard, such as ``"EQUALS_MATCH"``.
        about: the attribute or key that the guard asks for.
        text: what was seen.
        other: the second path of a guard that two lead to one object.
    """

    path: Path
    kind: str
    about: object
    text: str
    other: Path = ()

    @property
    def of_arguments(self) -> bool:
        """Whether it is about the arguments of a call, and not about the model."""
        return self.path[0] in (("local", "args"), ("local", "kwargs"))


@dataclass(slots=True)
class PlainValues:
    """What a trace read.

    Attributes:
        values: what can be told.
        untold: what can be compared in this process only: place and reason.
    """

    values: list[PlainValue] = field(default_factory=list)
    untold: list[str] = field(default_factory=list)


def plain_values(guards: Iterable[Guarded], now: LookUps) -> PlainValues:
    """The plain values behind guards of the trace that is running.

    Args:
        guards: those on the model, on what it reads of modules, and on arguments that are Python objects; tensors are left out, and of Python's,
            torch's and our own modules all but functions, since their versions are compared.
        now: what lies at their places.
    """
    found = PlainValues()
    seen: set[PlainValue] = set()
    for guard in guards:
        librarys = _is_librarys(guard.place, now)
        if guard.kind == "TENSOR_MATCH" or (librarys and not _is_function_of_module(guard, now)):
            continue
        try:
            value = _value(guard, now)
        except Untellable as error:
            if librarys:
                continue
            where = place_text(guard.place) or "the model"
            found.untold.append(f"{where} ({guard.kind}): {error}")
            continue
        if value not in seen:
            seen.add(value)
            found.values.append(value)
    return found


def _value(guard: Guarded, now: LookUps) -> PlainValue:
    if type(guard.about) not in _KEYS:
        raise Untellable(f"a key that is a {class_name(type(guard.about))}")
    path = _path(guard.place, now)
    if guard.other is not None:
        return PlainValue(path, guard.kind, None, "", _path(guard.other, now))
    return PlainValue(
        path, guard.kind, guard.about, seen_text(guard.kind, now.at(guard.place), guard.about)
    )


def differences(model: object, values: Iterable[PlainValue]) -> dict[PlainValue, str]:
    """What is not as ``values`` say in this process, of all but arguments, and how it differs."""
    now, places = LookUps({"local": {"model": model}}), Places()
    told = {
        each: difference(each, places.of(each.path), places, now)
        for each in values
        if not each.of_arguments
    }
    return {each: text for each, text in told.items() if text}


def difference(value: PlainValue, place: Place, places: Places, now: LookUps) -> str:
    """How what lies at ``place`` differs from ``value``; "" if it doesn't."""
    path, found = place_text(place) or "the model", now.at(place)
    if value.other:
        other = places.of(value.other)
        if found is not MISSING and found is now.at(other):
            return ""
        return f"{path} and {place_text(other)} were one object and are two now"
    if found is MISSING:
        return f"{path} was {value.text} and is not there"
    try:
        text = seen_text(value.kind, found, value.about)
    except Exception as error:  # noqa: BLE001 - of another kind than it was, it may raise anything
        text = str(error)
    if text == value.text:
        return ""
    if value.kind in _ATTRIBUTES:
        path = f"{place_text(place)}.{value.about}".lstrip(".")
    elif value.about is not None:
        path = f"{path} {value.about!r}"
    return f"{path} was {value.text} and is {text} now"


class Places:
    """Places by their paths, those with a common beginning under one base."""

    def __init__(self) -> None:
        self._known: dict[Path, Place] = {}

    def of(self, path: Path) -> Place:
        found = self._known.get(path)
        if found is None:
            base = self.of(path[:-1]) if len(path) > 1 else None
            kind, key = path[-1]
            if kind == "object":
                module, _, name = str(key).partition(":")
                found = Place(None, "import", module, module)
                for part in name.split("."):
                    found = Place(found, "attribute", part, f"{found.name}.{part}")
            else:
                found = Place(base, kind, key, "")
            self._known[path] = found
        return found


def import_starts(values: Iterable[PlainValue]) -> None:
    """Import the modules that ``values`` start in.

    Raises:
        ImportError: one can't be.
    """
    for kind, key in {value.path[0] for value in values}:
        if kind in ("import", "object"):
            importlib.import_module(str(key).partition(":")[0])


# --- paths --------------------------------------------------------------------------------------------


def _path(place: Place, now: LookUps) -> Path:
    steps: list[Step] = []
    for each in place.path():
        if each.base is None:
            steps = list(_start(each, now))
        elif each.kind == "unknown" or type(each.key) not in _KEYS:
            raise Untellable("what another process could not look up")
        else:
            steps.append((each.kind, each.key))
    return tuple(steps)


def weight_path(place: Place, now: LookUps) -> Path:
    """How the model, or an imported module, leads to a tensor by attributes and items alone; () if neither does."""
    try:
        start, *steps = _path(place, now)
    except Untellable:
        return ()
    if not steps or not (start == ("local", "model") or start[0] == "import"):
        return ()
    found: list[Step] = [start]
    for kind, key in steps:
        if kind not in ("attribute", "item"):
            return ()
        if kind == "item" and found[-1] in _TABLES:  # ``_parameters['weight']`` is an attribute
            found[-1] = ("attribute", key)
        else:
            found.append((kind, key))
    return tuple(found)


def _start(place: Place, now: LookUps) -> Sequence[Step]:
    if place.kind in ("local", "import"):
        return ((place.kind, place.key),)
    module = imported(str(place.key))
    value = now.at(place) if module is None else module
    if isinstance(value, types.ModuleType) and sys.modules.get(value.__name__) is value:
        return (("import", value.__name__),)
    if type(value) is dict and _scope_of(value) is not None:
        return ("import", value["__name__"]), ("attribute", "__dict__")
    name = f"{getattr(value, '__module__', '')}:{getattr(value, '__qualname__', '')}"
    if "<" not in name and _object_at(name) is value:
        return (("object", name),)
    raise Untellable(f"it begins at the global {place.key}, which another process could not find")


def _scope_of(value: dict[str, Any]) -> types.ModuleType | None:
    """The module whose variables these are."""
    module = sys.modules.get(str(value.get("__name__")))
    return module if getattr(module, "__dict__", None) is value else None


def _object_at(name: str) -> object:
    module, _, qualname = name.partition(":")
    value: object = sys.modules.get(module, MISSING)
    for part in qualname.split("."):
        value = getattr(value, part, MISSING)
    return value


def _is_librarys(place: Place, now: LookUps) -> bool:
    """Whether a place is inside Python, torch or piecework, whose versions an artifact compares."""
    *way, _ = path = place.path()
    if len(path) == 1 and place.kind == "global":
        return _library(now.at(place)) or str(place.key).startswith("__builtins_dict__")
    first = str(path[0].key)
    return first.startswith("__builtins_dict__") or any(_library(now.at(each)) for each in way)


def _is_function_of_module(guard: Guarded, now: LookUps) -> bool:
    """Whether it is about a function in a module, such as ``torch.nn.functional.linear``, which people replace by their own."""
    base = guard.place.base
    holder = None if base is None else now.at(base)
    return (
        guard.kind in OBJECTS
        and isinstance(holder, types.ModuleType)
        and holder.__name__.partition(".")[0] != "piecework"
        and isinstance(now.at(guard.place), (types.FunctionType, types.BuiltinFunctionType))
    )


def _library(value: object) -> bool:
    if type(value) is dict:  # the variables of a function: a module's, or those of a named tuple
        value = sys if "_tuple_new" in value else _scope_of(value)
    name = value.__name__ if isinstance(value, types.ModuleType) else None
    if name is None and isinstance(value, types.FunctionType):
        name = value.__module__
    root = (name or "").partition(".")[0]
    return root in ("torch", "piecework") or root in sys.stdlib_module_names


# --- texts --------------------------------------------------------------------------------------------


def seen_text(kind: str, value: Any, about: Any) -> str:
    """What a guard of this kind compares of ``value``, as a text.

    Raises:
        Untellable: it can be told apart in this process only.
    """
    if value is MISSING:
        raise Untellable("something that Dynamo looks up in a way of its own")
    if kind in CONSTANTS:
        return plain_text(value)
    if kind in OBJECTS:
        return object_text(value)
    match kind:
        case "TYPE_MATCH":
            return class_name(type(value))
        case "SEQUENCE_LENGTH" | "EMPTY_NN_MODULE_HOOKS_DICT":
            return f"{len(value)} items"
        case "DICT_KEYS_MATCH":
            return f"[{', '.join(map(_key_text, dict.keys(value)))}]"
        case "HASATTR":
            return "there" if hasattr(value, str(about)) else "missing"
        case "NOT_PRESENT_IN_GENERIC_DICT":
            return "there" if about in getattr(value, "__dict__", {}) else "missing"
    if kind in _CONTAINS:
        return "there" if about in value else "missing"
    raise Untellable(f"a guard of kind {kind}")


def _key_text(key: object) -> str:
    try:
        return plain_text(key)
    except Untellable:
        return object_text(key)


def plain_text(value: Any) -> str:
    """A text that is equal where values are, type by type: ``1``, ``1.0`` and ``True`` have three.

    Raises:
        Untellable: it, or something in it, is no plain value.
    """
    kind = type(value)
    if kind in _PLAIN:
        return repr(value)
    if kind in _OF_TORCH:
        return f"device {value}" if kind is torch.device else str(value)
    if kind in _SEQUENCES:
        return f"{kind.__name__}({', '.join(map(plain_text, value))})"
    if kind in (set, frozenset):
        return f"{kind.__name__}({', '.join(sorted(map(plain_text, value)))})"
    if kind is slice:
        return f"slice{plain_text((value.start, value.stop, value.step))}"
    if isinstance(value, enum.Enum):
        return f"{class_name(kind)}.{value.name} {plain_text(value.value)}"
    return object_text(value)


def is_fixed(value: object) -> bool:
    """Whether it is a value that nobody can change: a number, a text, a class, a function, a tuple or slice of such."""
    if type(value) in (tuple, torch.Size):
        return all(map(is_fixed, value))  # type: ignore[call-overload]
    if type(value) is slice:
        return all(map(is_fixed, (value.start, value.stop, value.step)))
    if type(value) is frozenset:
        return all(map(is_fixed, value))
    return type(value) in (*_PLAIN, *_OF_TORCH) or isinstance(value, (enum.Enum, *_NAMED))


def object_text(value: Any) -> str:
    """A text for a module, a class, a function or an operator: its name, and of a function what it runs.

    Raises:
        Untellable: it is told apart by identity alone.
    """
    if isinstance(value, types.ModuleType):
        return f"module {value.__name__}"
    if isinstance(value, type):
        return f"class {class_name(value)}"
    if isinstance(value, types.FunctionType):
        return f"function {value.__module__}.{value.__qualname__} {code_digest(value.__code__)}"
    if isinstance(value, types.CodeType):
        return f"code {code_digest(value)}"
    if isinstance(value, (types.BuiltinFunctionType, types.MethodDescriptorType)):
        return f"builtin {value.__qualname__}"
    if isinstance(value, (OpOverload, OpOverloadPacket, HigherOrderOperator)):
        return f"operator {value}"
    if value is None or isinstance(value, (*_PLAIN, *_OF_TORCH, enum.Enum)):
        return plain_text(value)
    raise Untellable(f"a {class_name(type(value))}, which can be told by identity alone")


def class_name(kind: type) -> str:
    """A class's name with its module's."""
    return f"{kind.__module__}.{kind.__qualname__}"


def code_digest(code: types.CodeType) -> str:
    """A digest of what code runs; lines and files don't count."""
    return digest_of(code, "code")[:32]
