"""Code by what it does. In: a function, a class, a code object. Out: its instructions and constants, and everything that it reaches by name.

It runs nothing. Text, comments, line numbers and the file do not count; neither does what an installed library brings, which counts by version.
"""

from __future__ import annotations

import dis
import enum
import importlib.util
import inspect
import sys
import types
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from piecework.code_objects import with_inner_code

if TYPE_CHECKING:
    from piecework.runtime.identity.values import Reader

_MISSING = object()
_GLOBAL = ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS")
_LOCAL = (
    "LOAD_FAST",
    "LOAD_NAME",
    "LOAD_DEREF",
    "LOAD_CLASSDEREF",
    "LOAD_FROM_DICT_OR_DEREF",
    "STORE_FAST_LOAD_FAST",
)
_ATTRIBUTE = ("LOAD_ATTR", "LOAD_METHOD")


def read_function(reader: Reader, function: types.FunctionType) -> Any:
    """A function of a library by its name; another by its code, its defaults, what it closes over and what it uses."""
    name = reader.libraries.name_of(function)
    if name is not None:
        return {"function": name}

    def content() -> dict[str, Any]:
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        return {
            "name": [function.__module__, function.__qualname__],
            "code": read_code(reader, function.__code__),
            "defaults": reader.read(function.__defaults__),
            "kwdefaults": reader.pairs((function.__kwdefaults__ or {}).items()),
            "attributes": reader.pairs(vars(function).items()),
            "annotations": _annotations(reader, function),
            "closure": [[each, read_cell(reader, cell)] for each, cell in cells],
            "uses": _uses(reader, function),
        }

    return reader.once(function, "function", content)


def read_cell(reader: Reader, cell: types.CellType) -> Any:
    try:
        value = cell.cell_contents
    except ValueError:  # the enclosing function has not assigned it
        return {"missing": True}
    return reader.read(value)


def read_code(reader: Reader, code: types.CodeType) -> Any:
    """A code object by what it runs: instructions, constants with their types, names, parameters."""
    return {
        "code": [
            code.co_qualname,
            code.co_code.hex(),
            [reader.read(each) for each in code.co_consts],
            [*map(list, (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars))],
            [code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags],
            code.co_exceptiontable.hex(),
        ]
    }


def read_class(reader: Reader, kind: type) -> Any:
    """A class of a library by its name; another by its bases and everything in its body as it is now."""
    name = reader.libraries.name_of(kind)
    if name is not None:
        return {"class": name}

    def content() -> dict[str, Any]:
        return {
            "name": [kind.__module__, kind.__qualname__],
            "type": reader.read(type(kind)),
            "bases": [reader.read(each) for each in kind.__bases__],
            "members": _members(reader, kind),
            "annotations": _annotations(reader, kind),
            "body": [[key, reader.read(value)] for key, value in _body(kind)],
        }

    return reader.once(kind, "class", content)


def _members(reader: Reader, kind: type) -> list[Any]:
    if not issubclass(kind, enum.Enum):
        return []
    return [[name, each.name, reader.read(each.value)] for name, each in kind.__members__.items()]


# What Python itself puts into a class: derived from the rest, or read on its own.
_DERIVED = frozenset(
    {
        *("__dict__", "__weakref__", "__module__", "__qualname__", "__annotations__"),
        *("__abstractmethods__", "_abc_impl", "__orig_bases__", "__parameters__"),
        *("__static_attributes__", "__firstlineno__", "__annotate__", "__annotate_func__"),
        *("__annotations_cache__", "__dataclass_params__", "__subclasshook__", "__hash__"),
    }
)
_OF_ENUM = frozenset(
    {
        *("_member_map_", "_member_names_", "_value2member_map_", "_member_type_", "_value_repr_"),
        *("_use_args_", "_new_member_", "_unhashable_values_", "_unhashable_values_map_"),
        *("_hashable_values_", "__new__", "__new_member__", "_generate_next_value_", "_boundary_"),
        *("_flag_mask_", "_all_bits_", "_singles_mask_", "_inverted_", "__reduce_ex__"),
    }
)


def _body(kind: type) -> Iterator[tuple[str, object]]:
    is_enum = issubclass(kind, enum.Enum)
    members = kind.__members__ if is_enum else {}
    for name, value in list(vars(kind).items()):
        if name in members or (is_enum and name in _OF_ENUM):
            continue
        if name not in _DERIVED or isinstance(value, types.FunctionType):
            yield name, value


def _annotations(reader: Reader, owner: Any) -> Any:
    try:
        found = inspect.get_annotations(owner)
    except (
        NameError
    ) as error:  # Python 3.14 evaluates them here, and one exists for type checkers only
        return {"unresolved": str(error)}
    return reader.pairs(found.items())


# --- what code reaches by name -----------------------------------------------------------------------


def _uses(reader: Reader, function: types.FunctionType) -> list[Any]:
    """Each global and each import of a function, with the attributes that are read of a module at once, and what that is now."""
    code = function.__code__
    imports = sorted(set(_imports(code, str(function.__globals__.get("__package__") or ""))))
    found: list[Any] = []
    for chain in sorted(set(_chains(code, _GLOBAL))):
        found.append([list(chain), _resolved(reader, _global(function, chain[0]), chain[1:])])
    for name, parts, bound in imports:
        chains = [(bound, each) for each in parts]
        if not parts:
            chains = sorted({c for c in _chains(code, _LOCAL) if c[0] == bound}) or [(bound,)]
        module = _imported(reader, name if parts else name.partition(".")[0])
        found += [[name, list(c), _resolved(reader, module, c[1:])] for c in chains]
    return found


def _global(function: types.FunctionType, name: str) -> object:
    scopes = (function.__globals__, function.__builtins__)
    return next((scope[name] for scope in scopes if name in scope), _MISSING)


def _imported(reader: Reader, name: str) -> object:
    module = sys.modules.get(name)
    if module is None and reader.libraries.library_of(name) is None:
        raise reader.unknown(
            f"code imports {name} where it runs, and it is not imported yet",
            hint="import it at the top of the module",
        )
    return _MISSING if module is None else module


def _resolved(reader: Reader, value: object, attributes: Sequence[str]) -> Any:
    for attribute in attributes:
        if not isinstance(value, types.ModuleType):
            break
        try:
            value = getattr(value, attribute)
        except AttributeError:
            value = _MISSING
    return {"missing": True} if value is _MISSING else reader.read(value)


def _chains(code: types.CodeType, loads: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Names that are loaded, each with the attributes that are read of it at once: ``("math", "pi")``."""
    for each in with_inner_code([code]):
        chain: list[str] = []
        cells = {*each.co_cellvars, *each.co_freevars}
        for instruction in dis.get_instructions(each):
            if chain and instruction.opname in _ATTRIBUTE:
                chain.append(str(instruction.argval))
                continue
            if chain:
                yield tuple(chain)
            chain = []
            if instruction.opname.startswith(loads):
                found = instruction.argval
                names = found if isinstance(found, tuple) else (found,)
                if instruction.opname.startswith("LOAD_FAST"):
                    # From Python 3.13 on this also puts a variable's cell into a closure, which reads nothing of it.
                    names = tuple(name for name in names if name not in cells)
                if not names:
                    continue
                *others, last = names
                yield from ((str(other),) for other in others)  # two loads in one instruction
                chain = [str(last)]


def _imports(code: types.CodeType, package: str) -> Iterator[tuple[str, tuple[str, ...], str]]:
    """Imports that run inside the code: the module's full name, what is taken from it, and the name that ``import`` binds."""
    for each in with_inner_code([code]):
        steps = list(dis.get_instructions(each))
        for index, step in enumerate(steps):
            if step.opname != "IMPORT_NAME":
                continue
            level, parts = steps[index - 2].argval, steps[index - 1].argval
            name = str(step.argval)
            if level:
                name = importlib.util.resolve_name("." * int(level) + name, package)
            stored = steps[index + 1]
            bound = str(stored.argval) if stored.opname.startswith("STORE") else ""
            yield name, tuple(parts or ()), bound
