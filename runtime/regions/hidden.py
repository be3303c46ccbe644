"""Ways from one layer to another that no guard shows. In: groups of layers, and the code of those that were traced. Out: nothing, or why the code may tell layers apart.

A layer's code may find another one by what they share (a parent, a registry), by a class, a closure or a global, and Dynamo guards
nothing of what it knows already. Everything that the code can reach is looked at, whether it reads it or not. Nothing of the user's runs.
"""

from __future__ import annotations

import gc
import inspect
import types
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch._ops import OpOverload, OpOverloadPacket

from piecework.code_objects import HEAP_TYPE, cells_of, global_names
from piecework.runtime.bind.asked import is_torchs
from piecework.runtime.bind.facts import MARK, is_fixed
from piecework.runtime.regions.found import Group
from piecework.runtime.regions.marks import Refused
from piecework.runtime.splitting_op import SplittingOp

# What tells objects apart by where they lie, or a mark from the function that it stands for.
_TELLS_APART = {"id", "hash", "signature", "getfullargspec", "getsource"}
_MUCH = 200_000
_PLAIN = (str, bool, int, float, "str", "bool", "int", "float")
# Python modules, and what no trace looks into.
_NOWHERE = (
    *(types.ModuleType, types.CodeType, types.FrameType, types.BuiltinFunctionType),
    *(SplittingOp, OpOverload, OpOverloadPacket, torch.library.CustomOpDef),
)

Scopes = Iterable[tuple[Mapping[str, object], types.CodeType]]


def require_apart(groups: Iterable[Group], owned: Mapping[int, int], code: Scopes) -> None:
    """Raise if code of a layer may tell it from others by more than what it holds.

    Args:
        owned: by identity, what is in a layer → the layer.
        code: what was traced inside of layers, with its globals.

    Raises:
        Refused: it may, or what it can reach is more than can be looked at.
    """
    groups = list(groups)
    holders = {id(each) for group in groups for each in (group.holder, group.holder._modules)}
    walk = _Walk(owned, holders)
    for group in groups:
        walk.require_own(group.first)
    for scope, each in code:
        if is_torchs(each):
            continue
        if _TELLS_APART & set(each.co_names):
            raise Refused(f"{each.co_qualname} may tell layers apart that are alike")
        for name in global_names(each) & scope.keys():
            for value in _of_global(scope[name], each):
                walk.require_none(name, value)


def _of_global(value: object, code: types.CodeType) -> Iterator[object]:
    """What code finds by a global: of a Python module what it names."""
    if isinstance(value, types.ModuleType):
        yield from (vars(value)[name] for name in set(code.co_names) & vars(value).keys())
    else:
        yield value


@dataclass(slots=True)
class _Walk:
    """Looks at what objects lead to.

    Args:
        owned: by identity, what is in a layer → the layer.
        holders: the lists of layers, by identity.
    """

    owned: Mapping[int, int]
    holders: set[int]
    _seen: dict[int, object] = field(default_factory=dict)

    def require_own(self, layer: torch.nn.Module) -> None:
        """Raise if a layer leads to another one."""
        for each in self._new(layer):
            if id(each) in self.holders or self.owned.get(id(each), id(layer)) != id(layer):
                raise Refused("a layer leads to another one, by what it holds or its class")

    def require_none(self, name: str, value: object) -> None:
        """Raise if a global leads to a layer."""
        if id(value) in self.owned:
            raise Refused(f"global {name} leads to a layer")
        for each in self._new(value):
            if id(each) in self.owned or id(each) in self.holders:
                raise Refused(f"global {name} leads to a layer")

    def _new(self, start: object) -> Iterator[object]:
        """All that an object leads to and nobody looked at."""
        pending = [start]
        while pending:
            each = pending.pop()
            if is_fixed(each) and not isinstance(each, (type, types.FunctionType, tuple)):
                continue
            if id(each) in self._seen:
                continue
            self._seen[id(each)] = each
            if len(self._seen) > _MUCH:
                raise Refused("its code can reach more than can be looked at")
            if _takes_for_given(each):
                raise Refused("its code may ask a function whose results a trace takes for given")
            yield each
            pending += _next(each)


def _takes_for_given(value: object) -> bool:
    """Whether a trace takes what a function returns for given (`torch.compiler.assume_constant_result`), and it may be asked about a layer."""
    if not isinstance(value, types.FunctionType):
        return False
    if "_dynamo_marked_constant" not in value.__dict__:
        return False
    code, kinds = value.__code__, value.__annotations__
    count = code.co_argcount + code.co_kwonlyargcount
    spread = code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS)
    return bool(spread) or any(kinds.get(n) not in _PLAIN for n in code.co_varnames[:count])


def _next(value: object) -> Iterable[object]:
    """What is in an object, and in its class."""
    if isinstance(value, _NOWHERE):
        return ()
    if isinstance(value, type):
        own = value.__flags__ & HEAP_TYPE and value.__module__.partition(".")[0] != "torch"
        return [*vars(value).values(), *value.__bases__] if own else ()
    if isinstance(value, torch.Tensor):
        return (value.__dict__,)
    if isinstance(value, weakref.ref):
        return (type(value), weakref.ref.__call__(value))
    if isinstance(value, types.FunctionType):
        if MARK in value.__dict__:
            return ()
        defaults = value.__defaults__, value.__kwdefaults__
        return (*cells_of(value).values(), *defaults, value.__dict__)
    return (type(value), *gc.get_referents(value))
