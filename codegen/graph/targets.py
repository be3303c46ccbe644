"""Paths of functions in emitted source; one is used only if it gives the very same object."""

import builtins
import math
import operator
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType, MethodDescriptorType, ModuleType
from typing import Any

import torch
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket

from piecework.codegen.plan.names import BUILTINS, is_identifier

ENTRY_NAME = "execution_fn"

_TORCH_NAMESPACES = (
    *("torch", "torch.nn.functional", "torch._C._nn", "torch._C._linalg", "torch._C._fft"),
    *("torch._C._special", "torch._C"),
)

# operator functions that have an operator sign with the same meaning, argument for argument.
INFIX = {
    **{operator.add: "+", operator.sub: "-", operator.mul: "*", operator.truediv: "/"},
    **{operator.floordiv: "//", operator.mod: "%", operator.pow: "**", operator.matmul: "@"},
    **{operator.lshift: "<<", operator.rshift: ">>", operator.and_: "&", operator.or_: "|"},
    **{operator.xor: "^", operator.eq: "==", operator.ne: "!=", operator.lt: "<"},
    **{operator.le: "<=", operator.gt: ">", operator.ge: ">="},
}
PREFIX = {operator.neg: "-", operator.pos: "+", operator.invert: "~", operator.not_: "not"}


@dataclass(frozen=True, slots=True)
class FunctionPath:
    """``path`` is what to write; ``module`` what to import first (None for builtins)."""

    path: str
    module: str | None

    @property
    def root(self) -> str:
        return self.path.partition(".")[0]


def function_path(target: object) -> FunctionPath | None:
    """The dotted path under which ``target`` is found again, or None (then it goes to consts)."""
    for module, path in _candidates(target):
        root, *rest = path.split(".")
        # An import may not hide a builtin or one of the emitted module's own names.
        hides = module and (root in BUILTINS or root.startswith("__") or root == ENTRY_NAME)
        if hides or not all(map(is_identifier, (root, *rest))):
            continue
        if _resolve(module, path) is target:
            return FunctionPath(path, module)
    return None


def sign_of(table: Mapping[Any, str], target: object) -> str | None:
    """The operator sign of ``target``, which may be any object, hashable or not."""
    return table.get(target) if isinstance(target, BuiltinFunctionType) else None


def _candidates(target: object) -> list[tuple[str | None, str]]:
    if isinstance(target, OpOverload):
        packet = f"torch.ops.{target.namespace}.{target._schema.name.split('::')[-1]}"
        return [("torch", f"{packet}.{target._overloadname}")]
    if isinstance(target, OpOverloadPacket):
        return [("torch", f"torch.ops.{target._qualified_op_name.replace('::', '.')}")]
    if isinstance(target, HigherOrderOperator):
        return [("torch", f"torch.ops.higher_order.{target._name}")]
    name = getattr(target, "__name__", None)
    if not isinstance(name, str):
        return []
    found: list[tuple[str | None, str]] = []
    if getattr(builtins, name, None) is target:
        found.append((None, name))
    for module in (operator, math):
        if getattr(module, name, None) is target:
            found.append((module.__name__, f"{module.__name__}.{name}"))
    found += [("torch", f"{namespace}.{name}") for namespace in _TORCH_NAMESPACES]
    owner = getattr(target, "__module__", None)
    qualname = getattr(target, "__qualname__", name)
    if isinstance(owner, str) and owner not in ("__main__", "builtins") and owner in sys.modules:
        public = owner.lstrip("_")  # functools.reduce says that it is of _functools
        owners = dict.fromkeys([public, owner] if public in sys.modules else [owner])
        found += [(each, f"{each}.{qualname}") for each in owners]
        found.append((owner, f"{owner}.{name}"))  # pybind's functions all have one qualname
    return found


ABSENT = object()


def _resolve(module: str | None, path: str) -> object:
    """What ``path`` means after ``import module``; `ABSENT` if only code can tell."""
    root, *rest = path.split(".")
    value = sys.modules.get(root, ABSENT) if module else vars(builtins).get(root, ABSENT)
    for part in rest:
        value = _attribute_at_rest(value, part)
    return value


def _attribute_at_rest(owner: object, name: str) -> object:
    """An attribute that is found without running code of its owner (but torch.ops); or `ABSENT`."""
    if isinstance(owner, _OPERATORS):
        try:
            return getattr(owner, name)
        except (AttributeError, ImportError, RuntimeError, TypeError, ValueError):
            return ABSENT
    if isinstance(owner, ModuleType):
        return ModuleType.__getattribute__(owner, "__dict__").get(name, ABSENT)
    for base in type.__dict__["__mro__"].__get__(owner) if isinstance(owner, type) else ():
        found = type.__dict__["__dict__"].__get__(base).get(name, ABSENT)
        if isinstance(found, staticmethod):
            return found.__func__
        if found is not ABSENT:
            plain = (FunctionType, BuiltinFunctionType, MethodDescriptorType, type)
            computed = hasattr(type(found), "__get__") and not isinstance(found, plain)
            return ABSENT if computed else found
    return ABSENT


# ``torch.ops``, its namespaces, and operators with overloads.
_OPS = (torch.ops, torch.ops.aten, torch.ops.higher_order)
_OPERATORS = (*map(type, _OPS), OpOverloadPacket)
