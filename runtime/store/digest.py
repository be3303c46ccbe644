"""One digest of Python values and of code: equal in any process where they are equal.

Values are written with their exact types, so that ``True``, ``1``, ``1.0`` and ``"1"`` differ. Code
counts by what it runs and by what it reaches by name; what an installed library brings, by the
library's version; an object by what it gives for pickling, or by its method ``uuid()``. What has no
stable form is an error.
"""

from __future__ import annotations

import copyreg
import enum
import functools
import hashlib
import json
import os
import sys
import sysconfig
import types
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from typing import Any

from piecework.code_objects import HEAP_TYPE, global_names, with_inner_code
from piecework.errors import Unidentifiable

_HINT = "give it a method uuid() that returns a string"


def canonical(value: Any, where: str) -> Any:
    """``value`` as plain JSON data: equal for equal content in any process, different for any other
    type or content.

    Args:
        where: the field it comes from, for the error.

    Raises:
        Unidentifiable: the value, or something in it, has no stable form, as a tensor or a lock.

    Example:
        >>> canonical((1, True, 1.0, "1"), "x")
        [1, True, 1.0, '1']
    """
    try:
        return _Reader(where).read(value)
    except RecursionError:
        why = "it is nested too deeply to have a stable form"
        raise Unidentifiable(why, where=where, hint=_HINT) from None


def text_of(value: Any) -> str:
    """Plain JSON data as one text, whatever the order of its keys."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def digest_of(value: Any, where: str) -> str:
    """SHA-256 of `canonical`; raises as it does."""
    return hashlib.sha256(text_of(canonical(value, where)).encode()).hexdigest()


class _Reader:
    """One reading of one value; it numbers the values that it has met."""

    def __init__(self, where: str) -> None:
        self.where = where
        self._numbers: dict[int, int] = {}
        self._alive: list[object] = []  # so that no address is used twice while this reads

    def read(self, value: Any) -> Any:
        """``value`` as plain JSON data; an object in it has one key."""
        kind = type(value)
        if value is None or kind in (bool, float, int, str):
            return value
        if kind in _PLAIN:
            return {kind.__name__: _PLAIN[kind](value)}
        if kind is tuple:
            return [self.read(item) for item in value]
        if kind in _PARTS:
            return self.once(value, kind.__name__, lambda: self.read(_PARTS[kind](value)))
        if kind in (set, frozenset):
            return self.once(value, kind.__name__, lambda: self.unordered(value))
        if isinstance(value, type):
            return self._class(value)
        if kind is types.FunctionType:
            return self.function(value)
        if kind is types.CodeType:
            return {"code": self.read(_content(value))}
        if kind in (types.BuiltinFunctionType, types.MethodWrapperType):
            return self._builtin(value)
        if isinstance(value, types.ModuleType):
            return {"module": self._required(library_of(value.__name__), value.__name__)}
        if kind.__module__.partition(".")[0] == "torch" or _is_operator(value):
            return self._of_torch(value)
        return self._object(value)

    def once(self, value: object, tag: str, content: Callable[[], Any]) -> Any:
        """``{tag: content()}`` where ``value`` is met first, its number after that."""
        known = self._numbers.get(id(value))
        if known is not None:
            return {"seen": known}
        self._numbers[id(value)] = len(self._numbers)
        self._alive.append(value)
        return {tag: content()}

    def unordered(self, values: Iterable[object]) -> list[Any]:
        """Items of a set, in the order of what they are and not of their hashes."""
        alone = [(text_of(_Reader(self.where).read(value)), value) for value in values]
        return [self.read(value) for _, value in sorted(alone, key=lambda pair: pair[0])]

    def unknown(self, what: str) -> Unidentifiable:
        why = f"{what} has no stable form, so it can't be part of the cache key"
        return Unidentifiable(why, where=self.where, hint=_HINT)

    def _required(self, library: str | None, what: str) -> str:
        if library is None:
            raise self.unknown(f"{what}, which is in no installed library,")
        return f"{library}: {what}"

    def _object(self, value: Any) -> Any:
        kind = type(value)
        # Looked up in the classes: an object that answers for every name does not speak for itself.
        if any(callable(vars(base).get("uuid")) for base in kind.__mro__):
            own = value.uuid()
            if own is None:
                raise self.unknown(f"uuid() of a {kind.__qualname__} returned None, which")
            return {"uuid": [kind.__module__, kind.__qualname__, self.read(own)]}
        if kind is object:
            raise self.unknown("an object")
        if isinstance(value, Mapping) and not isinstance(value, dict):
            return {"mapping": self.read((kind, *sorted(value.items())))}
        try:
            reduce = copyreg.dispatch_table.get(kind)
            made = value.__reduce_ex__(4) if reduce is None else reduce(value)
        except Exception as error:
            raise self.unknown(f"an object of {kind.__qualname__}") from error
        if isinstance(made, str):
            return {"name": [library_of(kind.__module__), kind.__module__, made]}
        parts = (list(each) if hasattr(each, "__next__") else each for each in made)
        return self.once(value, "made", lambda: [self.read(each) for each in parts])

    def _of_torch(self, value: Any) -> Any:
        name = type(value).__name__
        if _is_operator(value):
            # torch is imported where such a thing exists; nothing else here needs it.
            from piecework.runtime.store.operators import operator_content

            return self.once(value, "operator", lambda: self.read(operator_content(value)))
        if name in ("dtype", "device", "layout", "memory_format", "Tag", "Size"):
            return {f"torch.{name}": str(value)}
        raise self.unknown(f"a {type(value).__module__}.{name}")

    # --- code ----------------------------------------------------------------------------------------

    def function(self, function: types.FunctionType) -> Any:
        """A library's function by its name; another by its code, defaults, closure and globals."""
        if name := name_of(function):
            return {"function": name}
        code = list(with_inner_code([function.__code__]))
        names = {name for each in code for name in each.co_names}
        scopes = (function.__globals__, function.__builtins__)
        used = sorted(set().union(*map(global_names, code)))
        found = [
            (name, next((scope[name] for scope in scopes if name in scope), _MISSING))
            for name in used
        ]
        imported = sorted(names & sys.modules.keys())
        found += [(name, sys.modules[name]) for name in imported if library_of(name) is None]

        def content() -> list[Any]:
            return [
                [function.__module__, function.__qualname__, self.read(function.__code__)],
                self.read((function.__defaults__, function.__kwdefaults__, vars(function))),
                self.read(function.__closure__),
                [[name, self._reached(value, names)] for name, value in found],
            ]

        return self.once(function, "function", content)

    def _reached(self, value: Any, attributes: set[str]) -> Any:
        """What code reaches by a name; of a module in no library, what it may read of it."""
        if isinstance(value, types.ModuleType) and library_of(value.__name__) is None:
            held = vars(value)
            read = sorted(attributes & held.keys())
            return [
                value.__name__,
                [[each, self._reached(held[each], attributes)] for each in read],
            ]
        return self.read(value)

    def _builtin(self, value: Any) -> Any:
        """A function written in C, or one that is bound to a value."""
        owner = getattr(value, "__self__", None)
        if owner is not None and not isinstance(owner, types.ModuleType):
            return {"builtin": [value.__name__, self.read(owner)]}
        module = value.__module__ or getattr(owner, "__name__", None)
        return {"builtin": self._required(library_of(module), f"{module}.{value.__qualname__}")}

    def _class(self, kind: type) -> Any:
        """A class of a library by its name; another by its bases and its body as it is now."""
        if name := name_of(kind):
            return {"class": name}
        members = kind.__members__ if issubclass(kind, enum.Enum) else {}
        python = {"_abc_impl", *(name for name in vars(kind) if members and name[0] == "_")}
        body = [
            (name, value)
            for name, value in vars(kind).items()
            if name not in python and (callable(value) or not name.startswith("__"))
        ]

        def content() -> list[Any]:
            return [
                [kind.__module__, kind.__qualname__, self.read((type(kind), *kind.__bases__))],
                [[name, each.name, self.read(each.value)] for name, each in members.items()],
                [[name, self.read(value)] for name, value in body if name not in members],
            ]

        return self.once(kind, "class", content)


_MISSING = "a name that is not there"
_PLAIN: dict[type, Callable[[Any], str]] = {
    complex: repr,
    bytes: bytes.hex,
    type(...): str,
    type(NotImplemented): str,
}
#: Kinds that count by their parts; a dict by its order too, which code may see.
_PARTS: dict[type, Callable[[Any], tuple[Any, ...]]] = {
    list: tuple,
    dict: lambda value: tuple(value.items()),
    types.MappingProxyType: lambda value: tuple(value.items()),
    property: lambda value: (value.fget, value.fset, value.fdel),
    staticmethod: lambda value: (value.__func__,),
    classmethod: lambda value: (value.__func__,),
    types.MethodType: lambda value: (value.__func__, value.__self__),
    types.CellType: lambda value: tuple(_cell(value)),
    functools.cached_property: lambda value: (value.func,),
    type(functools.lru_cache(len)): lambda v: (v.__wrapped__, v.cache_parameters()),
}


def _cell(cell: types.CellType) -> Iterable[Any]:
    try:
        return (cell.cell_contents,)
    except ValueError:  # the enclosing function has not assigned it
        return ()


def _content(code: types.CodeType) -> tuple[Any, ...]:
    """A code object by what it runs: instructions, constants with their types, names."""
    names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
    counts = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
    text = (code.co_qualname, code.co_code, code.co_exceptiontable)
    return (*text, code.co_consts, names, counts)


def _is_operator(value: object) -> bool:
    """Whether it is of one of the classes in ``torch._ops``."""
    return any(base.__module__ == "torch._ops" for base in type(value).__mro__)


# --- libraries ---------------------------------------------------------------------------------------

_OWN = ("piecework.codegen", "piecework.runtime", "piecework.templates", "piecework.errors")
_TORCH = ("torch", "torchgen", "functorch", "triton")


def name_of(value: Any) -> str | None:
    """The full name of a library's function or class; None where it leads to something else."""
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    library = library_of(module)
    if library is None or not isinstance(name, str):
        return None
    found: object = sys.modules.get(str(module))
    for part in name.split("."):
        found = getattr(found, part, None)
    fixed = isinstance(value, type) and not value.__flags__ & HEAP_TYPE
    return f"{library}: {module}.{name}" if found is value or fixed else None


def library_of(module: object) -> str | None:
    """Whose module it is, as ``torch 2.13.0``; None for one that counts by its content."""
    if not isinstance(module, str):
        return None
    if module.startswith(_OWN):
        return "piecework"  # its sources are in the key
    top = module.partition(".")[0]
    loaded = sys.modules.get(module) or sys.modules.get(top)
    file = getattr(loaded, "__file__", None)
    return _library(top, file if isinstance(file, str) else "")


@functools.cache
def _library(top: str, file: str) -> str | None:
    if top in sys.stdlib_module_names:
        return "python" if not file or _lies_in(file, ("stdlib", "platstdlib")) else None
    if top not in _TORCH and not (file and _lies_in(file, ("purelib", "platlib"))):
        return None
    version = getattr(sys.modules.get(top), "__version__", None)
    try:
        return f"{top} {metadata.version(top)}"
    except metadata.PackageNotFoundError:
        if isinstance(version, str) and version:  # of another name than its package
            return f"{top} {version}"
    names = metadata.packages_distributions().get(top)  # it reads every package's list of files
    return f"{top} {metadata.version(names[0])}" if names else None


def _lies_in(file: str, places: tuple[str, ...]) -> bool:
    paths = sysconfig.get_paths()
    real = os.path.realpath(file)
    return any(real.startswith(os.path.realpath(paths[each]) + os.sep) for each in places)
