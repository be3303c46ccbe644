"""Whether classes are as the trace saw them. In: classes and the code that the trace went through. Out: look-ups to watch, and which name of which class changed.

Dynamo takes the methods of a class for constant. Here the function, property or other descriptor that a name leads to must stay the very
object it was, on the class where it was; plain values of a class are guarded, and left to the facts about them.
"""

from __future__ import annotations

import types
from collections.abc import Iterable

import torch

from piecework.code_objects import HEAP_TYPE
from piecework.runtime import torch_compat
from piecework.runtime.bind.asked import is_torchs, may_ask, models_names, names_in
from piecework.runtime.bind.places import Step

_STATE = ("__code__", "__defaults__", "__kwdefaults__")
_Found = tuple[type, object]


class ClassWatch:
    """Some classes as they are now.

    Args:
        classes: those whose instances the trace looked into.
        code: what the trace went through.
        asked: what that may ask an object for, where it is known already.
    """

    def __init__(
        self,
        classes: Iterable[type],
        code: frozenset[types.CodeType],
        asked: tuple[frozenset[str] | None] | None = None,
    ) -> None:
        self.asked = names_in(code) if asked is None else asked[0]
        self._listed = "dir" in models_names(code)
        self._names = {each: _resolved(each) for each in classes if each.__flags__ & HEAP_TYPE}
        self._orders = {kind: kind.__mro__ for kind in self._names}
        self._functions = {
            id(function): (function, _state(function))
            for names in self._names.values()
            for function in map(function_of, (value for _, value in names.values()))
            if function is not None
            and function.__code__ in code
            and not is_torchs(function.__code__)
        }

    @property
    def classes(self) -> tuple[type, ...]:
        return tuple(self._names)

    def steps(self) -> list[Step]:
        """The look-ups whose results would change with the classes."""
        steps: dict[tuple[int, object], Step] = {}
        for kind in self._names:
            steps[id(kind), "mro"] = Step.of(kind, "__mro__", kind.__qualname__, "attribute")
            for each in kind.__mro__:
                if each.__flags__ & HEAP_TYPE:
                    held = torch_compat.class_dict(each)
                    step = (
                        Step.of(each, None, each.__qualname__, "class")
                        if held is None
                        else Step.of(held, None, each.__qualname__, "keys")
                    )
                    steps[id(each), "dict"] = step
        for function, _ in self._functions.values():
            for name in _STATE:
                steps[id(function), name] = Step.of(
                    function, name, function.__qualname__, "attribute"
                )
        return list(steps.values())

    def difference(self) -> str:
        """What changed in a way that the graph does not show; "" if nothing did."""
        for kind, before in self._names.items():
            if kind.__mro__ != self._orders[kind]:
                return f"{kind.__qualname__} has other bases than when the model was traced"
            now = _resolved(kind)
            for name in before.keys() | now.keys():
                # What is there already may be asked for by torch, as a forward is by the call of its module.
                if name not in before and not may_ask(self.asked, name):
                    continue
                if _makes_modules(name, before, now):
                    continue
                listed = self._listed and (name in before) is not (name in now) and name[:2] != "__"
                if listed or _differ(before.get(name), now.get(name)):
                    return f"{kind.__qualname__}.{name} was replaced since the model was traced"
        for function, state in self._functions.values():
            if any(a is not b for a, b in zip(_state(function), state, strict=True)):
                return f"function {function.__qualname__} has other code or defaults than when the model was traced"
        return ""


def _makes_modules(name: str, *found: dict[str, _Found]) -> bool:
    """Whether ``name`` is how torch makes its own modules: Dynamo wraps both functions when it first runs in a process, and no call goes through them."""
    owners = {each[name][0] for each in found if name in each}
    return name in ("__init__", "__setstate__") and owners == {torch.nn.Module}


def _resolved(kind: type) -> dict[str, _Found]:
    """What each name of the class leads to, and on which class it is."""
    found: dict[str, _Found] = {}
    for each in reversed(kind.__mro__[:-1]):
        found.update({name: (each, value) for name, value in each.__dict__.items()})
    return found


def _differ(before: _Found | None, now: _Found | None) -> bool:
    if before is None or now is None:
        # A name that led nowhere is guarded where it was asked for, if nothing but a value comes or goes.
        _, value = before or now or (None, None)
        return _describes(value)
    if before[0] is not now[0]:
        return True
    return before[1] is not now[1] and (_describes(before[1]) or _describes(now[1]))


def _describes(value: object) -> bool:
    return hasattr(type(value), "__get__") or callable(value)


def function_of(value: object) -> types.FunctionType | None:
    """The function behind what a class body holds: a function, property, static or class method; None for anything else."""
    value = getattr(value, "fget", getattr(value, "__func__", value))
    return value if isinstance(value, types.FunctionType) else None


def _state(function: types.FunctionType) -> tuple[object, ...]:
    return tuple(getattr(function, name) for name in _STATE)
