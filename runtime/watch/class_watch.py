"""Whether the methods of traced classes are the ones that were traced.

Dynamo takes the methods of a class for constant. Here what a traced method's name leads to must stay the very object it was, with its code and
defaults; plain values of a class are Dynamo's to guard.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping

from piecework.code_objects import HEAP_TYPE
from piecework.runtime import torch_compat
from piecework.runtime.torch_compat import Guarded, Place
from piecework.runtime.watch.dict_watch import Look
from piecework.runtime.watch.places import static

#: The kind of what `ClassWatch.guards` gives.
METHOD = "METHOD"
_STATE = ("__code__", "__defaults__", "__kwdefaults__")
# Where Python itself looks, whatever the traced code says.
_ALWAYS = ("__call__", "__getattr__", "__getattribute__")


class ClassWatch:
    """The methods of some classes as they are now.

    Args:
        classes: those whose instances the trace looked into, each with a place that leads to it.
        code: what it went through.
    """

    def __init__(self, classes: Mapping[type, Place], code: Iterable[types.CodeType]) -> None:
        traced = frozenset(code)
        self.classes = {kind: at for kind, at in classes.items() if kind.__flags__ & HEAP_TYPE}
        self._methods: dict[type, dict[str, object]] = {}
        self._functions: dict[types.FunctionType, tuple[object, ...]] = {}
        for kind in self.classes:
            held = {k: v for each in reversed(kind.__mro__) for k, v in vars(each).items()}
            self._methods[kind] = {name: held[name] for name in _ALWAYS if name in held}
            for name, value in held.items():
                function = function_of(value)
                if function is not None and function.__code__ in traced:
                    self._methods[kind][name] = value
                    self._functions[function] = _state(function)

    def looks(self) -> list[Look]:
        """The look-ups whose results would change with the classes."""
        every = {each for kind in self.classes for each in kind.__mro__}
        tables = [torch_compat.class_dict(each) for each in every if each.__flags__ & HEAP_TYPE]
        return [Look.of(each, None, "keys") for each in tables] + [
            Look.of(function, name, "attribute")
            for function, state in self._functions.items()
            for name, value in zip(_STATE, state, strict=True)
            if value is not None  # a call that was traced without defaults needs none
        ]

    def difference(self) -> str:
        """Which method is another; "" if none is."""
        for kind, methods in self._methods.items():
            for name, value in methods.items():
                if static(kind, name) is not value:
                    return f"{kind.__qualname__}.{name} was replaced since the model was traced"
        for function, state in self._functions.items():
            if any(a is not b for a, b in zip(_state(function), state, strict=True)):
                return f"function {function.__qualname__} has other code or defaults than when the model was traced"
        return ""

    def guards(self) -> list[Guarded]:
        """The methods as what another process can compare."""
        return [
            Guarded((*self.classes[kind], ("static", name)), METHOD)
            for kind, methods in self._methods.items()
            for name in (*_ALWAYS, *methods)
        ]


def _state(function: types.FunctionType) -> tuple[object, ...]:
    return tuple(getattr(function, name) for name in _STATE)


def function_of(value: object) -> types.FunctionType | None:
    """The function behind what a class body holds: a function, property, static or class method; None for anything else."""
    value = getattr(value, "fget", getattr(value, "__func__", value))
    return value if isinstance(value, types.FunctionType) else None
