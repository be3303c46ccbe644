"""One digest of Python values and of code: equal in any process where they are equal.

Values count with their exact types; code by what it runs and reaches by name; what a library
brings, by its version; an object by its ``uuid()``, or what it gives for pickling.
"""

import collections
import copyreg
import dis
import enum
import functools
import hashlib
import json
import os
import sys
import sysconfig
import types
from collections.abc import Callable
from typing import Any

from piecework.code_objects import HEAP_TYPE, global_names, with_inner_code
from piecework.errors import Unidentifiable

_HINT = "give it a method uuid() that returns a string"


def canonical(value: Any, where: str) -> Any:
    """``value`` as plain JSON data, which differs for any other type or content."""
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
        # With the values, so that no address is used twice while this reads.
        self._numbers: dict[int, tuple[int, object]] = {}

    def read(self, value: Any) -> Any:
        kind = type(value)
        if value is None or kind in (bool, float, int, str):
            return value
        if kind in (complex, bytes, type(...), type(NotImplemented)):
            return {kind.__name__: repr(value)}
        if kind is tuple:
            return [self.read(item) for item in value]
        if kind in (set, frozenset):
            return {kind.__name__: sorted(text_of(canonical(item, self.where)) for item in value)}
        if kind in _PARTS:
            return self._once(value, kind.__name__, lambda: self.read(_PARTS[kind](value)))
        if isinstance(value, (type, types.FunctionType)):
            tag = "class" if isinstance(value, type) else "function"
            if name := name_of(value):
                return {tag: name}
            content = self._class if isinstance(value, type) else self._function
            return self._once(value, tag, lambda: content(value))
        if kind in (types.BuiltinFunctionType, types.MethodWrapperType):
            return {"builtin": self._builtin(value)}
        if kind is types.ModuleType:
            return {"module": self._required(value.__name__, value.__name__)}
        if any(base.__module__ == "torch._ops" for base in kind.__mro__):
            return self._once(value, "operator", lambda: self.read(_operator(value)))
        if kind.__module__.partition(".")[0] == "torch":
            if kind.__name__ in ("dtype", "device", "layout", "memory_format", "Tag", "Size"):
                return {f"torch.{kind.__name__}": str(value)}
            raise self._unknown(f"a {kind.__module__}.{kind.__name__}")
        return self._object(value)

    def _once(self, value: object, tag: str, content: Callable[[], Any]) -> Any:
        """``{tag: content()}`` where ``value`` is met first, its number after that."""
        if id(value) in self._numbers:
            return {"seen": self._numbers[id(value)][0]}
        self._numbers[id(value)] = len(self._numbers), value
        return {tag: content()}

    def _unknown(self, what: str) -> Unidentifiable:
        why = f"{what} has no stable form, so it can't be part of the cache key"
        return Unidentifiable(why, where=self.where, hint=_HINT)

    def _required(self, module: object, what: str) -> str:
        """What a library brings; another module's content is not looked through."""
        library = library_of(module)
        if library is None:
            raise self._unknown(f"{what}, which is in no installed library,")
        return f"{library}: {what}"

    def _object(self, value: Any) -> Any:
        kind = type(value)
        # Looked up in the classes: an object that answers for every name does not speak for itself.
        if any(callable(vars(base).get("uuid")) for base in kind.__mro__):
            own = value.uuid()
            if own is None:
                raise self._unknown(f"uuid() of a {kind.__qualname__} returned None, which")
            return {"uuid": [kind.__module__, kind.__qualname__, self.read(own)]}
        if kind is object:
            raise self._unknown("an object")
        try:
            reduce = copyreg.dispatch_table.get(kind)
            made = value.__reduce_ex__(4) if reduce is None else reduce(value)
        except Exception as error:
            raise self._unknown(f"an object of {kind.__qualname__}") from error
        if isinstance(made, str):
            return {"name": self._required(kind.__module__, made)}
        parts = (list(each) if hasattr(each, "__next__") else each for each in made)
        return self._once(value, "made", lambda: [self.read(each) for each in parts])

    def _function(self, function: types.FunctionType) -> list[Any]:
        """A function's code, defaults, closure, and what it reads of its globals and imports."""
        code = list(with_inner_code([function.__code__]))
        scopes = (function.__globals__, function.__builtins__)
        names = sorted(set().union(*map(global_names, code)))
        known = collections.ChainMap(*scopes)
        for step in (step for each in code for step in dis.get_instructions(each)):
            if step.opname == "IMPORT_NAME":
                self._required(step.argval, f"module {step.argval}")
        return [
            [function.__module__, function.__qualname__, self.read(function.__code__)],
            self.read((function.__defaults__, function.__kwdefaults__, vars(function))),
            self.read(function.__closure__),
            [[name, self.read(known.get(name, "a name that is not there"))] for name in names],
        ]

    def _class(self, kind: type) -> list[Any]:
        """A class's bases and its body as it is now."""
        members = kind.__members__ if issubclass(kind, enum.Enum) else {}
        body = [
            (name, value)
            for name, value in vars(kind).items()
            if (callable(value) or not name.startswith("__"))
            and not (name == "_abc_impl" or name in members or (members and name[0] == "_"))
        ]
        return [
            [kind.__module__, kind.__qualname__, self.read((type(kind), *kind.__bases__))],
            [[name, each.name, self.read(each.value)] for name, each in members.items()],
            [[name, self.read(value)] for name, value in body],
        ]

    def _builtin(self, value: Any) -> Any:
        """A function written in C, or one that is bound to a value."""
        owner = getattr(value, "__self__", None)
        if owner is not None and not isinstance(owner, types.ModuleType):
            return [value.__name__, self.read(owner)]
        module = value.__module__ or getattr(owner, "__name__", None)
        return self._required(module, f"{module}.{value.__qualname__}")


def _code_parts(code: types.CodeType) -> tuple[Any, ...]:
    """What code runs; lines and files don't count."""
    numbers = code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags
    names = code.co_name, code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars
    return *numbers, *names, code.co_code, code.co_exceptiontable, code.co_consts


def _cell(cell: types.CellType) -> tuple[Any, ...]:
    try:
        return (cell.cell_contents,)
    except ValueError:  # the enclosing function has not assigned it
        return ()


#: Kinds that count by their parts; a dict by its order too, which code may see.
_PARTS: dict[type, Callable[[Any], tuple[Any, ...]]] = {
    list: tuple,
    dict: lambda value: tuple(value.items()),
    property: lambda value: (value.fget, value.fset, value.fdel),
    staticmethod: lambda value: (value.__func__,),
    classmethod: lambda value: (value.__func__,),
    types.MethodType: lambda value: (value.__func__, value.__self__),
    types.CellType: _cell,
    types.CodeType: _code_parts,
    type(functools.lru_cache(len)): lambda v: (v.__wrapped__, v.cache_parameters()),
}


def _operator(op: Any) -> list[Any]:
    """What code that calls ``op`` was compiled for: its schema, tags, fake implementation."""
    # torch is imported where such a thing exists; nothing else here needs it.
    from torch._ops import HigherOrderOperator, OpOverload

    from piecework.codegen.graph.schemas import overloads_of
    from piecework.runtime import torch_compat

    if isinstance(op, HigherOrderOperator):
        return ["higher order", op.name()]
    if not isinstance(op, OpOverload):
        return list(overloads_of(op))
    name = f"{op._schema.name}.{op._overloadname}"
    if torch_compat.is_torch_operator(op):
        return [name]
    fake = torch_compat.fake_of(op)
    if op._schema.returns and fake is None:
        why = f"the fake implementation of {op} can't be read"
        hint = "register it with torch.library.custom_op and register_fake"
        raise Unidentifiable(why, where=str(op), hint=hint)
    return [name, str(op._schema), sorted(map(str, op.tags)), fake]


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
    """Whose module it is, as ``numpy 2.1.0``; None for one that counts by its content."""
    if not isinstance(module, str):
        return None
    top = module.partition(".")[0]
    if module == "piecework" or module.startswith(_OWN) or top in _TORCH:
        return top  # its version or sources are in the key
    file = getattr(sys.modules.get(module) or sys.modules.get(top), "__file__", None) or ""
    installed = _is_installed(file)
    if top in sys.stdlib_module_names:
        return "python" if installed or not file else None
    version = getattr(sys.modules.get(top), "__version__", None)
    return f"{top} {version}" if installed and isinstance(version, str) and version else None


@functools.cache
def _is_installed(file: str) -> bool:
    places = map(sysconfig.get_path, ("stdlib", "platstdlib", "purelib", "platlib"))
    return os.path.realpath(file).startswith(tuple(os.path.realpath(p) + os.sep for p in places))
