"""The modules that traced functions are from. In: the code of a trace, and what it looked at. Out: the function whose globals Dynamo guarded in another place than it reads them.

Before torch 2.15 Dynamo guards the globals of an inlined function as attributes of whatever module is imported by the name that these globals give. That is another one where
a module was imported anew meanwhile, or where code was executed in a dictionary of somebody's own: the guards are then on values that nobody reads.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Collection, Iterable, Iterator


def forget_imports() -> None:
    """Let Dynamo look modules up again, which it does once a process and name."""
    from torch._dynamo import symbolic_convert

    clear = getattr(getattr(symbolic_convert, "_import_module", None), "cache_clear", None)
    if clear is not None:
        clear()


def guarded_elsewhere(
    values: Iterable[object], code: Collection[types.CodeType]
) -> types.FunctionType | None:
    """A traced function whose globals are guarded as another module's; None if there is none, or if this torch looks.

    Args:
        values: what the trace looked at: functions, and objects and classes that have them.
        code: what it went through.
    """
    from torch._dynamo import symbolic_convert

    if hasattr(symbolic_convert, "_registered_module_for_globals"):
        return None
    known: dict[int, bool] = {}
    for function in _functions(values):
        scope = function.__globals__
        if id(scope) not in known:
            known[id(scope)] = _is_imported(scope)
        if not known[id(scope)] and function.__code__ in code:
            return function
    return None


def _is_imported(scope: dict[str, object]) -> bool:
    """Whether these are the variables of the module by that name; True if they name none, and Dynamo guards them by themselves."""
    name = scope.get("__name__")
    if not isinstance(name, str) or name.startswith("namedtuple_") or "torch_package" in name:
        return True
    if getattr(sys.modules.get(name), "__dict__", None) is scope:
        return True
    # Some of Python's own have another name than they are imported by; Dynamo guards nothing of these.
    known = getattr(scope.get("__spec__"), "name", "")
    of_python = known.partition(".")[0] in sys.stdlib_module_names
    return of_python and getattr(sys.modules.get(known), "__dict__", None) is scope


def _functions(values: Iterable[object]) -> Iterator[types.FunctionType]:
    """The functions among values, and those of their classes."""
    seen: set[type] = set()
    for value in values:
        function = value.__func__ if isinstance(value, types.MethodType) else value
        if isinstance(function, types.FunctionType):
            yield function
            continue
        for kind in (value if isinstance(value, type) else type(value)).__mro__:
            if kind not in seen:
                seen.add(kind)
                yield from _methods(kind)


def _methods(kind: type) -> Iterator[types.FunctionType]:
    for held in list(vars(kind).values()):
        function = held.fget if isinstance(held, property) else held
        if isinstance(function, (staticmethod, classmethod)):
            function = function.__func__
        if isinstance(function, types.FunctionType):
            yield function
