"""What makes Python values the same in two processes. In: a value that a trace took for constant, a class, a code object. Out: a text, equal where a captured graph can't tell the difference.

It is an allow-list, and shallow: what code reaches by name has facts of its own. Objects that are told apart by identity alone have no likeness.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import sys
import types
from typing import Any

import torch
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket

from piecework.runtime.bind.asked import is_torchs
from piecework.runtime.bind.facts import class_name

_PLAIN = (int, bool, str, bytes, type(None), type(...), type(NotImplemented), range)
_TORCHS = (torch.dtype, torch.device, torch.layout, torch.memory_format)
_SEQUENCES = (tuple, list, torch.Size)
_C_DESCRIPTORS = (
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
    types.ClassMethodDescriptorType,
)
#: A plain value of a class, or none.
A_VALUE = "a value"


class Unlike(Exception):
    """A value that means something in its own process only."""


def likeness(value: Any, inside: tuple[int, ...] = ()) -> str:
    """A text that says what ``value`` is.

    Args:
        inside: functions that ``value`` was reached through; one that closes over itself is met again.

    Raises:
        Unlike: it, or something in it, is told apart by identity alone.
    """
    kind = type(value)
    if kind in _PLAIN or kind in (float, complex):
        return f"{kind.__name__} {value!r}"
    if kind in _TORCHS:
        return f"torch {value}"
    if kind in _SEQUENCES:
        return f"{kind.__name__}({', '.join(likeness(each, inside) for each in value)})"
    if kind in (set, frozenset):
        return f"{kind.__name__}({', '.join(sorted(likeness(each, inside) for each in value))})"
    if kind is slice:
        return f"slice{likeness((value.start, value.stop, value.step), inside)}"
    if isinstance(value, enum.Enum):
        return f"enum {class_name(kind)}.{value.name} {likeness(value.value, inside)}"
    if isinstance(value, type):
        return f"class {class_name(value)}"
    if kind is types.CodeType:
        return f"code {code_digest(value)}"
    if kind is types.FunctionType:
        return "itself" if id(value) in inside else _function(value, (*inside, id(value)))
    if kind is functools.partial and not vars(value):
        given = (value.args, tuple(value.keywords.items()))
        return f"partial {likeness(value.func, inside)} {likeness(given, inside)}"
    if kind is types.ModuleType and sys.modules.get(value.__name__) is value:
        return f"module {value.__name__}"
    return _of_library(value)


def _of_library(value: Any) -> str:
    kind = type(value)
    if kind in (types.BuiltinFunctionType, types.MethodWrapperType):
        owner = getattr(value, "__self__", None)
        if owner is None or isinstance(owner, (types.ModuleType, type)):
            return f"builtin {getattr(owner, '__name__', '')}.{value.__qualname__}"
        home = sys.modules.get(getattr(value, "__module__", None) or "")
        if home is not None and getattr(home, value.__name__, None) is value:  # pybind's
            return f"builtin {home.__name__}.{value.__name__}"
    if kind in _C_DESCRIPTORS:
        return f"descriptor {class_name(value.__objclass__)}.{value.__name__}"
    if isinstance(value, (OpOverload, OpOverloadPacket)):
        return f"operator {value}"
    if type(value) is type(torch.ops.aten) and getattr(torch.ops, value.name, None) is value:
        return f"operators {value.name}"
    if isinstance(value, HigherOrderOperator):
        return f"operator {value.name()}"
    lazy = isinstance(value, types.ModuleType)  # or a namespace of operators
    if lazy and sys.modules.get(value.__name__) is value:
        return f"module {value.__name__}"
    raise Unlike(f"a {class_name(kind)}")


def _function(function: types.FunctionType, inside: tuple[int, ...]) -> str:
    """A function by what it runs: its code, its defaults, and what it closes over, which has facts of its own where it was traced."""
    keywords = (function.__kwdefaults__ or {}).items()
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    code = function.__code__
    own = "torch's own" if is_torchs(code) else code_digest(code)  # which its version tells
    parts = [
        f"function {function.__module__}.{function.__qualname__} {own}",
        *(described(each, inside) for each in function.__defaults__ or ()),
        *(f"{name}={described(each, inside)}" for name, each in keywords),
        *(f"{name}: {_cell(each, inside)}" for name, each in cells),
    ]
    return digest("\n".join(parts))


def _cell(cell: types.CellType, inside: tuple[int, ...]) -> str:
    try:
        return described(cell.cell_contents, inside)
    except ValueError:
        return "nothing yet"


def described(value: Any, inside: tuple[int, ...] = ()) -> str:
    """`likeness`, or the class of what has none."""
    try:
        return likeness(value, inside)
    except Unlike:
        return f"a {class_name(type(value))}"


def digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


@functools.cache
def _name_digest(code: types.CodeType, name: str) -> str:
    return digest(f"{name} {_code_text(code)}")


def code_digest(code: types.CodeType) -> str:
    """What a code object runs: instructions, constants with their types, names. Its file and lines don't count."""
    return _name_digest(code, code.co_qualname)


def _code_text(code: types.CodeType) -> str:
    consts = [
        code_digest(each) if isinstance(each, types.CodeType) else described(each)
        for each in code.co_consts
    ]
    names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
    counts = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
    return f"{code.co_code.hex()} {consts} {names} {counts} {code.co_exceptiontable.hex()}"


# --- classes -----------------------------------------------------------------------------------------


def class_table(kind: type) -> dict[str, str]:
    """What each name of a class's own body leads to; plain values have facts of their own, and are only said to be there."""
    found: dict[str, str] = {}
    for name, value in list(kind.__dict__.items()):
        if name in _DERIVED:
            continue
        if kind is torch.nn.Module and name in _TRACKED and is_torchs_function(value):
            continue
        code = hasattr(type(value), "__get__") or callable(value)
        found[name] = _member(value) if code else A_VALUE
    return found


# Dynamo exchanges these once it compiles anything, to count the modules that are made.
_TRACKED = frozenset({"__init__", "__setstate__"})


def is_torchs_function(value: object) -> bool:
    return isinstance(value, types.FunctionType) and is_torchs(value.__code__)


# What Python itself keeps there, and nobody looks up to run it; of slots once an instance was copied.
_DERIVED = frozenset(
    {"__dict__", "__weakref__", "__annotate__", "__annotate_func__", "__slotnames__"}
)


def _member(value: Any) -> str:
    if isinstance(value, (staticmethod, classmethod)):
        return f"{type(value).__name__} {_member(value.__func__)}"
    if isinstance(value, property):
        return " ".join(["property", *(_member(f) for f in (value.fget, value.fset, value.fdel))])
    inner = getattr(value, "__wrapped__", None) or getattr(value, "func", None)
    if inner is not None and type(value) is not types.FunctionType and callable(inner):
        return f"{class_name(type(value))} {_member(inner)}"
    return described(value)
