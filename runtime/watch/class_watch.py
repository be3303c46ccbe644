"""Whether the methods of traced classes are the ones that were traced.

Dynamo takes the methods of a class for constant. Here the function, property or other descriptor that a name leads to must stay the very object it was, on the
class where it was; plain values of a class are Dynamo's to guard.
"""

from __future__ import annotations

import types
from collections.abc import Iterable

import torch

from piecework.code_objects import HEAP_TYPE, with_inner_code
from piecework.runtime import torch_compat
from piecework.runtime.watch.places import Step
from piecework.runtime.watch.values import class_name, code_digest

_STATE = ("__code__", "__defaults__", "__kwdefaults__")
# Dynamo wraps both when it first runs in a process, and no traced call goes through them.
_WRAPPED_BY_DYNAMO = {(torch.nn.Module, "__init__"), (torch.nn.Module, "__setstate__")}
# Where Python itself looks, whatever the traced code says.
_ALWAYS = ("__call__", "__getattr__", "__getattribute__")
_Found = tuple[type, object]


class ClassWatch:
    """The methods of some classes as they are now.

    Args:
        classes: those whose instances the trace looked into.
        code: what it went through; the methods that count are of this code, or have a name that it says.
    """

    def __init__(self, classes: Iterable[type], code: Iterable[types.CodeType]) -> None:
        self._code = frozenset(code)
        every = list(with_inner_code(self._code))
        self._said = {"__call__", "forward", *(name for each in every for name in each.co_names)}
        self._said |= {text for each in every for text in each.co_consts if type(text) is str}
        self._methods = {kind: self._of(kind) for kind in classes if kind.__flags__ & HEAP_TYPE}
        self._orders = {kind: kind.__mro__ for kind in self._methods}
        self._functions = {
            function: tuple(getattr(function, name) for name in _STATE)
            for found in self._methods.values()
            for function in (function_of(value) for _, value in found.values())
            if function is not None and function.__code__ in self._code
        }

    @property
    def classes(self) -> tuple[type, ...]:
        return tuple(self._methods)

    def _of(self, kind: type) -> dict[str, _Found]:
        """The methods that count, by name, each with the class that it is on."""
        found: dict[str, _Found] = {}
        for each in reversed(kind.__mro__[:-1]):
            found.update({name: (each, value) for name, value in each.__dict__.items()})
        return {name: at for name, at in found.items() if self._counts(name, *at)}

    def _counts(self, name: str, owner: type, value: object) -> bool:
        if (owner, name) in _WRAPPED_BY_DYNAMO:
            return False
        if not (hasattr(type(value), "__get__") or callable(value)):
            return False
        function = function_of(value)
        return name in self._said or (function is not None and function.__code__ in self._code)

    def steps(self) -> list[Step]:
        """The look-ups whose results would change with the classes."""
        steps: dict[tuple[int, object], Step] = {}
        for kind in self._methods:
            steps[id(kind), "mro"] = Step.of(kind, "__mro__", "attribute")
            for each in kind.__mro__:
                if each.__flags__ & HEAP_TYPE:
                    held = torch_compat.class_dict(each)
                    steps[id(each), "dict"] = (
                        Step.of(each, None, "class")
                        if held is None
                        else Step.of(held, None, "keys", holder=each)
                    )
        for function, state in self._functions.items():
            for name, value in zip(_STATE, state, strict=True):
                if value is not None:  # a call that was traced without defaults needs none
                    steps[id(function), name] = Step.of(function, name, "attribute")
        return list(steps.values())

    def difference(self) -> str:
        """Which method is another; "" if none is."""
        for kind, before in self._methods.items():
            if kind.__mro__ != self._orders[kind]:
                return f"{kind.__qualname__} has other bases than when the model was traced"
            now = self._of(kind)
            for name in before.keys() | now.keys():
                # A new name counts where it hides a traced one, which is missing here then, or was asked for in vain.
                was, is_now = before.get(name), now.get(name)
                if was is None and function_of(is_now and is_now[1]) is None:
                    continue
                if was is None or is_now is None or was[0] is not is_now[0] or was[1] is not is_now[1]:  # fmt: skip
                    return f"{kind.__qualname__}.{name} was replaced since the model was traced"
        for function, state in self._functions.items():
            now_state = (getattr(function, name) for name in _STATE)
            if any(a is not b for a, b in zip(now_state, state, strict=True)):
                return f"function {function.__qualname__} has other code or defaults than when the model was traced"
        return ""

    def digests(self) -> dict[str, dict[str, str]]:
        """Of each class the traced methods by name, with digests of their code, for another process."""
        found = {}
        for kind, methods in self._methods.items():
            names = [n for n, (_, value) in methods.items() if self._was_traced(value)]
            found[class_name(kind)] = {n: digest_of(kind, n) for n in (*_ALWAYS, *names)}
        return found

    def _was_traced(self, value: object) -> bool:
        function = function_of(value)
        return function is not None and function.__code__ in self._code


def digest_of(kind: type, name: str) -> str:
    """What `ClassWatch.digests` says of a method in this process."""
    for owner in kind.__mro__:
        if name in owner.__dict__:
            function = function_of(owner.__dict__[name])
            code = "" if function is None else f" {code_digest(function.__code__)}"
            return f"{class_name(owner)}{code}"
    return "missing"


def function_of(value: object) -> types.FunctionType | None:
    """The function behind what a class body holds: a function, property, static or class method; None for anything else."""
    value = getattr(value, "fget", getattr(value, "__func__", value))
    return value if isinstance(value, types.FunctionType) else None
