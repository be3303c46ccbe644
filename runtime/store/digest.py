"""One digest of Python values and of code: equal in any process where they are equal.

Values are written with their exact types, so that ``True``, ``1``, ``1.0`` and ``"1"`` differ. Code counts by what it runs
and by all that it reaches by name, not by its text or place; what an installed library brings, by the library's version;
an object by what it gives for pickling, or by its method ``uuid()``. What has no stable form is an error.
"""

from __future__ import annotations

import copyreg
import dis
import enum
import functools
import hashlib
import importlib.util
import json
import os
import sys
import sysconfig
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import metadata
from typing import Any

from piecework.code_objects import HEAP_TYPE, global_names, with_inner_code
from piecework.errors import Unidentifiable

_MAX_VALUES = 200_000
_HINT = "give it a method uuid() that returns a string"
_MISSING = object()


def canonical(value: Any, where: str) -> Any:
    """``value`` as plain JSON data: equal for equal content in any process, different for any other type or content.

    Args:
        where: the field it comes from, for the error.

    Raises:
        Unidentifiable: the value, or something in it, has no stable form: a tensor, a lock, code that reads the environment or runs text.

    Example:
        >>> canonical((1, True, 1.0, "1"), "x")
        [1, True, 1.0, '1']
    """
    try:
        return _Reader(where).read(value)
    except RecursionError:
        raise Unidentifiable(
            "it is nested too deeply to have a stable form", where=where, hint=_HINT
        ) from None


def text_of(value: Any) -> str:
    """Plain JSON data as one text, whatever the order of its keys."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def digest_of(value: Any, where: str) -> str:
    """SHA-256 of `canonical`; raises as it does."""
    return hashlib.sha256(text_of(canonical(value, where)).encode()).hexdigest()


class _Reader:
    """One reading of one value; it numbers the mutable values that it has met, which may hold each other."""

    def __init__(self, where: str) -> None:
        self.where = where
        self._libraries: dict[str, str | None] = {}
        self._numbers: dict[int, int] = {}
        self._alive: list[object] = []  # so that no address is used twice while this reads
        self._read = 0

    def read(self, value: Any) -> Any:
        """``value`` as plain JSON data; a JSON object always has one key, which says what it stands for."""
        self._read += 1
        if self._read > _MAX_VALUES:
            raise self.unknown("it reaches too much to have a stable form")
        kind = type(value)
        if value is None or kind in (bool, float, int, str):
            return value
        if kind in _PLAIN:
            return _PLAIN[kind](value)
        if kind is tuple:
            return [self.read(item) for item in value]
        if kind in _CONTAINERS:
            return self.once(value, kind.__name__, lambda: _CONTAINERS[kind](self, value))
        if kind in _CODE:
            return _CODE[kind](self, value)
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, types.ModuleType):
            return self._module(value)
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

    def pairs(self, items: Iterable[tuple[object, object]]) -> list[Any]:
        """Keys and values, in their order."""
        return [[self.read(key), self.read(value)] for key, value in items]

    def unknown(self, why: str, hint: str = _HINT) -> Unidentifiable:
        return Unidentifiable(
            f"{why}, so it can't be part of the cache key", where=self.where, hint=hint
        )

    # --- objects -------------------------------------------------------------------------------------

    def _object(self, value: Any) -> Any:
        kind = type(value)
        no_form = f"an object of {kind.__qualname__} has no stable form"
        # Looked up in the classes: an object that answers for every name does not speak for itself.
        if any(callable(vars(base).get("uuid")) for base in kind.__mro__):
            own = value.uuid()
            if own is None:
                raise self.unknown(f"uuid() of a {kind.__qualname__} returned None")
            return {"uuid": [kind.__module__, kind.__qualname__, self.read(own)]}
        if kind is object or isinstance(value, os._Environ):
            raise self.unknown(no_form)
        if isinstance(value, (set, frozenset)):
            parts = [self.unordered(value), self.pairs(getattr(value, "__dict__", {}).items())]
            return {"set": [self.read(kind), *parts]}
        if isinstance(value, Mapping) and not isinstance(value, dict):
            return {"mapping": [self.read(kind), self.pairs(sorted(value.items()))]}
        try:
            reduce = copyreg.dispatch_table.get(kind)
            made = value.__reduce_ex__(4) if reduce is None else reduce(value)
        except Exception as error:
            raise self.unknown(no_form) from error
        if isinstance(made, str):
            return {"name": [self.library_of(kind.__module__), kind.__module__, made]}
        return self.once(value, "made", lambda: [self.read(_listed(each)) for each in made])

    def _of_torch(self, value: Any) -> Any:
        name = type(value).__name__
        if _is_operator(value):
            # torch is imported where such a thing exists; nothing else here needs it.
            from piecework.runtime.store.operators import operator_content

            return self.once(value, "operator", lambda: self.read(operator_content(value)))
        if name in ("dtype", "device", "layout", "memory_format", "Tag", "Size"):
            return {f"torch.{name}": str(value)}
        raise self.unknown(f"a {type(value).__module__}.{name} has no stable form")

    def _module(self, value: types.ModuleType) -> Any:
        library = self.library_of(value.__name__)
        if library is None:
            raise self.unknown(
                f"module {value.__name__} is used as a value, and what is read of it can't be seen",
                hint="import the names that are used, or give the pass a method uuid()",
            )
        return {"module": f"{library}: {value.__name__}"}

    # --- code ----------------------------------------------------------------------------------------

    def function(self, function: types.FunctionType) -> Any:
        """A function of a library by its name; another by its code, its defaults, what it closes over and what it uses."""
        name = self.name_of(function)
        if name is not None:
            return {"function": name}

        def content() -> list[Any]:
            cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
            return [
                [function.__module__, function.__qualname__],
                self.code(function.__code__),
                self.read(function.__defaults__),
                self.pairs((function.__kwdefaults__ or {}).items()),
                self.pairs(vars(function).items()),
                [[each, self.cell(cell)] for each, cell in cells],
                list(self._uses(function)),
            ]

        return self.once(function, "function", content)

    def cell(self, cell: types.CellType) -> Any:
        try:
            value = cell.cell_contents
        except ValueError:  # the enclosing function has not assigned it
            value = _MISSING
        return self._found(value, ())

    def code(self, code: types.CodeType) -> Any:
        """A code object by what it runs: instructions, constants with their types, names, parameters."""
        names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
        counts = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
        consts = [self.read(each) for each in code.co_consts]
        shape = [list(map(list, names)), list(counts), code.co_exceptiontable.hex()]
        return {"code": [code.co_qualname, code.co_code.hex(), consts, *shape]}

    def builtin(self, value: Any) -> Any:
        """A function written in C, or one that is bound to a value."""
        owner = getattr(value, "__self__", None)
        if owner is not None and not isinstance(owner, types.ModuleType):
            return {"builtin": [value.__name__, self.read(owner)]}
        module = value.__module__ or getattr(owner, "__name__", None)
        library = self.library_of(module)
        if library is None or value.__name__ in _BLIND:
            raise self.unknown(f"{value.__qualname__}() looks at what has no stable form")
        return {"builtin": f"{library}: {module}.{value.__qualname__}"}

    def _class(self, kind: type) -> Any:
        """A class of a library by its name; another by its bases and everything in its body as it is now."""
        name = self.name_of(kind)
        if name is not None:
            return {"class": name}
        members = kind.__members__ if issubclass(kind, enum.Enum) else {}

        def content() -> list[Any]:
            return [
                [kind.__module__, kind.__qualname__, self.read(type(kind))],
                [self.read(each) for each in kind.__bases__],
                [[key, each.name, self.read(each.value)] for key, each in members.items()],
                [[key, self.read(value)] for key, value in _body(kind, members)],
            ]

        return self.once(kind, "class", content)

    def _uses(self, function: types.FunctionType) -> Iterator[Any]:
        """What a function reaches: its globals and its imports, and of modules what it reads of them, as they are now."""
        code = list(with_inner_code([function.__code__]))
        attributes = sorted({name for each in code for name in each.co_names})
        for name in sorted(set().union(*map(global_names, code))):
            scopes = (function.__globals__, function.__builtins__)
            value = next((scope[name] for scope in scopes if name in scope), _MISSING)
            yield [name, self._found(value, attributes)]
        package = str(function.__globals__.get("__package__") or "")
        for name in sorted(set(_imports(code, package))):
            module = sys.modules.get(name)
            if module is None and self.library_of(name) is None:
                raise self.unknown(
                    f"code imports {name} where it runs, and it is not imported yet",
                    hint="import it at the top of the module",
                )
            if module is not None:
                yield [name, self._found(module, attributes)]

    def _found(self, value: Any, attributes: Iterable[str]) -> Any:
        if value is _MISSING:
            return {"missing": True}
        if not isinstance(value, types.ModuleType):
            return self.read(value)
        held = vars(value)
        if self.library_of(value.__name__) is None:
            read = [
                [each, self._found(held[each], attributes)] for each in attributes if each in held
            ]
            return {"module": [value.__name__, read]}
        functions = [held[each] for each in attributes if isinstance(held.get(each), _FUNCTIONS)]
        if os.getenv in functions or (value is os and "environ" in attributes):
            raise self.unknown("code reads the environment")
        patched = [self.read(each) for each in functions if not self.name_of(each)]
        return {"module": [self._module(value), patched]}

    # --- libraries -----------------------------------------------------------------------------------

    def library_of(self, module: object) -> str | None:
        """``torch 2.13.0`` for ``torch.nn``: whose module it is; None for one that counts by its content."""
        if not isinstance(module, str):
            return None
        if module not in self._libraries:
            self._libraries[module] = _library(module)
        return self._libraries[module]

    def name_of(self, value: Any) -> str | None:
        """The full name of a library's function or class; None where the name does not lead to ``value`` itself."""
        module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
        library = self.library_of(module)
        if library is None or not isinstance(name, str):
            return None
        found: object = sys.modules.get(str(module))
        for part in name.split("."):
            found = getattr(found, part, None)
        fixed = isinstance(value, type) and not value.__flags__ & HEAP_TYPE
        return f"{library}: {module}.{name}" if found is value or fixed else None


# --- kinds -------------------------------------------------------------------------------------------


_PLAIN: dict[type, Callable[[Any], Any]] = {
    complex: lambda value: {"complex": repr(value)},
    bytes: lambda value: {"bytes": value.hex()},
    type(...): lambda value: {"constant": "..."},
    type(NotImplemented): lambda value: {"constant": "NotImplemented"},
}
_CONTAINERS: dict[type, Callable[[_Reader, Any], Any]] = {
    list: lambda reader, value: [reader.read(each) for each in value],
    dict: lambda reader, value: reader.pairs(value.items()),  # in their order, which code may see
    types.MappingProxyType: lambda reader, value: reader.pairs(value.items()),
    set: lambda reader, value: reader.unordered(value),
    frozenset: lambda reader, value: reader.unordered(value),
    property: lambda reader, v: [reader.read(each) for each in (v.fget, v.fset, v.fdel)],
    staticmethod: lambda reader, value: reader.read(value.__func__),
    classmethod: lambda reader, value: reader.read(value.__func__),
    functools.cached_property: lambda reader, value: reader.read(value.func),
    type(functools.lru_cache(len)): lambda reader, value: [
        reader.read(value.__wrapped__),
        reader.read(value.cache_parameters()),
    ],
}
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType)
_CODE: dict[type, Callable[[_Reader, Any], Any]] = {
    types.FunctionType: _Reader.function,
    types.CodeType: _Reader.code,
    types.CellType: _Reader.cell,
    types.BuiltinFunctionType: _Reader.builtin,
    types.MethodWrapperType: _Reader.builtin,
    types.MethodType: lambda reader, value: {
        "method": [reader.read(value.__func__), reader.read(value.__self__)]
    },
}
# Built-in functions that run text, or read what is outside of the program.
_BLIND = frozenset(
    {"__import__", "breakpoint", "compile", "eval", "exec", "globals", "input", "open"}
)


def _is_operator(value: object) -> bool:
    """Whether it is of one of the classes in ``torch._ops``; where torch is not imported nothing is."""
    return any(base.__module__ == "torch._ops" for base in type(value).__mro__)


def _listed(part: Any) -> Any:
    """A part of what ``__reduce_ex__`` gives; items come as iterators."""
    return list(part) if hasattr(part, "__next__") else part


def _body(kind: type, members: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    """What a class holds, less what Python itself puts there, and an enumeration's members."""
    of_enum = issubclass(kind, enum.Enum)
    for name, value in list(vars(kind).items()):
        pythons = name.startswith("__") or name in ("_abc_impl", *members)
        function = isinstance(value, types.FunctionType)
        enums = of_enum and (
            getattr(value, "__module__", "") == "enum" if function else name[0] == "_"
        )
        if (callable(value) or not pythons) and name not in members and not enums:
            yield name, value


def _imports(code: Iterable[types.CodeType], package: str) -> Iterator[str]:
    """The full names of modules that code imports where it runs."""
    for each in code:
        steps = list(dis.get_instructions(each))
        for index, step in enumerate(steps):
            if step.opname == "IMPORT_NAME":
                level = int(steps[index - 2].argval)
                name = "." * level + str(step.argval)
                yield importlib.util.resolve_name(name, package) if level else name


def _library(module: str) -> str | None:
    top = module.partition(".")[0]
    if module.startswith(_OWN):
        return "piecework"  # its sources are in the key
    loaded = sys.modules.get(module) or sys.modules.get(top)
    file = getattr(loaded, "__file__", None)
    if top in sys.stdlib_module_names:
        shadowed = isinstance(file, str) and not _lies_in(file, ("stdlib", "platstdlib"))
        return None if shadowed else "python"
    if loaded is None or not (top in _TORCH or _lies_in(str(file), ("purelib", "platlib"))):
        return None
    for name in (top, *metadata.packages_distributions().get(top, ())):
        try:
            return f"{top} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue
    version = getattr(loaded, "__version__", None)  # put on the path without being installed
    return f"{top} {version}" if version and top in _TORCH else None


_OWN = ("piecework.codegen", "piecework.runtime", "piecework.templates", "piecework.errors")
_TORCH = ("torch", "torchgen", "functorch", "triton")


def _lies_in(file: str, places: tuple[str, ...]) -> bool:
    paths = sysconfig.get_paths()
    real = os.path.realpath(file)
    return any(real.startswith(os.path.realpath(paths[each]) + os.sep) for each in places)
