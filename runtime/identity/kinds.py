"""The kinds of values that have an identity besides plain data. In: a value. Out: who reads it, in the order in which they are asked.

The list is complete: what is on it, and instances of classes written in Python, have a stable form, and nothing else does.
"""

from __future__ import annotations

import array
import collections
import dataclasses
import decimal
import enum
import fractions
import functools
import logging
import operator
import pathlib
import re
import types
import typing
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from piecework.runtime.identity import code as code_reader
from piecework.runtime.identity.frozen_map import FrozenMap

if TYPE_CHECKING:
    from piecework.runtime.identity.values import Reader

Read = Callable[["Reader", Any], Any]


def exactly(*kinds: type) -> Callable[[Any], bool]:
    """Whether a value is of one of these types, and not of a subclass, which may behave otherwise."""
    return lambda value: type(value) in kinds


def an(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kinds)


def _of_torch(value: Any) -> bool:
    return type(value).__module__ in ("torch", "torch._ops") or _is_higher_order(value)


def _is_higher_order(value: Any) -> bool:
    return any(
        (base.__module__, base.__name__) == ("torch._ops", "HigherOrderOperator")
        for base in type(value).__mro__
    )


def _torch(reader: Reader, value: Any) -> Any:
    name = type(value).__name__
    if name in ("OpOverload", "OpOverloadPacket") or _is_higher_order(value):
        # torch is imported where such a thing exists; nothing else here needs it.
        from piecework.runtime.identity.operators import read_operator

        return read_operator(reader, value)
    if name in ("dtype", "device", "layout", "memory_format", "Tag"):
        return {f"torch.{name}": str(value)}
    if name == "Size":
        return {"torch.Size": [reader.read(each) for each in value]}
    if isinstance(value, types.ModuleType):
        return _module(reader, value)
    raise reader.unknown(f"a {type(value).__module__}.{name} has no stable form")


def _enum(reader: Reader, value: enum.Enum) -> Any:
    kind = type(value)
    own = [(k, v) for k, v in vars(value).items() if not k.startswith("_")]
    return {"enum": [reader.read(kind), value.name, reader.read(value.value), reader.pairs(own)]}


def _dict(reader: Reader, value: dict[object, object]) -> Any:
    """Dicts in their order, which whoever iterates over one sees."""
    tag = type(value).__name__

    def content() -> Any:
        factory = [reader.read(value.default_factory)] if tag == "defaultdict" else []  # type: ignore[attr-defined]
        own = [reader.pairs(vars(value).items())] if getattr(value, "__dict__", None) else []
        return [*factory, *own, reader.pairs(dict.items(value))]

    return reader.once(value, tag, content)


def _parts(reader: Reader, value: Any) -> list[Any]:
    """What a value of Python's own says, for ``pickle``, that it is made of: what makes it, of which arguments, what is set then, and the items."""
    made, arguments, *rest = value.__reduce_ex__(4)
    return [
        reader.read(list(each) if hasattr(each, "__next__") else each)
        for each in (made, arguments, *rest)
    ]


def _builtin(reader: Reader, value: Any) -> Any:
    owner = getattr(value, "__self__", None)
    if owner is not None and not isinstance(owner, types.ModuleType):
        return {"builtin": [value.__name__, reader.read(owner)]}
    name = reader.libraries.builtin_name(value)
    if name is None:
        raise reader.unknown(f"{value.__qualname__}() looks at what has no stable form")
    return {"builtin": name}


def _module(reader: Reader, value: types.ModuleType) -> Any:
    library = reader.libraries.library_of(value.__name__)
    space = value.__name__.removeprefix("torch.ops.")
    if library is None or (
        type(value).__name__ == "_OpNamespace" and space not in ("aten", "prims")
    ):
        raise reader.unknown(
            f"module {value.__name__} is used as a value, and what is read of it can't be seen",
            hint="import the names that are used, or give the pass a method uuid()",
        )
    return {"module": f"{library}: {value.__name__}"}


def _wrapped(reader: Reader, value: Any) -> Any:
    """What is wrapped by a static, class or cached method, or a cache."""
    inner = getattr(value, "__wrapped__", None) or getattr(value, "func", None)
    options = value.cache_parameters() if hasattr(value, "cache_parameters") else {}
    return {type(value).__name__: [reader.read(inner), reader.pairs(options.items())]}


def _field(reader: Reader, value: Any) -> Any:
    names = ("name", "default", "default_factory", "init", "repr", "hash", "compare", "kw_only")
    metadata = reader.pairs(dict(value.metadata).items())
    return {"field": [*(reader.read(getattr(value, each)) for each in names), metadata]}


def _type_form(reader: Reader, value: Any) -> Any:
    """``list[int]``, ``int | None``, ``Callable[[int], str]`` and the like."""
    origin, arguments = typing.get_origin(value), typing.get_args(value)
    if origin is None:  # Any, a ForwardRef, a type variable: its text has its name and nothing else
        if re.search(r"0x[0-9a-f]+", repr(value)):
            raise reader.unknown(f"a {type(value).__qualname__} has no stable form")
        return {"form": [type(value).__qualname__, repr(value)]}
    return {"form": [type(value).__qualname__, reader.read(origin), reader.read(arguments)]}


_NAMED_FIELD = type(vars(collections.namedtuple("_One", "x"))["x"])
_SENTINELS = (
    type(dataclasses.MISSING),
    getattr(dataclasses, "_HAS_DEFAULT_FACTORY_CLASS", type(dataclasses.MISSING)),
)
# Special forms of typing have no public types.
_FORMS = (
    type(typing.Any),
    type(typing.ClassVar),
    type(typing.Callable[[int], int]),
    type(typing.Literal[1]),
    type(typing.ClassVar[int]),
    type(typing.Generic[typing.TypeVar("_T")]),  # type: ignore[index]
    typing.ForwardRef,
    typing.TypeVar,
    typing.ParamSpec,
    types.GenericAlias,
    types.UnionType,
)

#: Who reads what; the first that fits.
KINDS: tuple[tuple[Callable[[Any], bool], Read], ...] = (
    (an(enum.Enum), _enum),
    (exactly(list), lambda r, v: r.once(v, "list", lambda: [r.read(each) for each in v])),
    (exactly(dict, collections.OrderedDict, collections.defaultdict, collections.Counter), _dict),
    (exactly(set), lambda r, v: r.once(v, "set", lambda: r.unordered(v))),
    (
        exactly(collections.deque, functools.partial, bytearray, array.array),
        lambda r, v: r.once(v, type(v).__name__, lambda: _parts(r, v)),
    ),
    (exactly(re.Pattern), lambda r, v: {"pattern": [r.read(v.pattern), int(v.flags)]}),
    (
        exactly(
            *(slice, decimal.Decimal, fractions.Fraction, _NAMED_FIELD),
            *(operator.itemgetter, operator.attrgetter, operator.methodcaller),
        ),
        lambda r, v: {type(v).__name__: _parts(r, v)},
    ),
    (exactly(frozenset), lambda r, v: {"frozenset": r.unordered(v)}),
    # Options by name; their order means nothing.
    (exactly(FrozenMap), lambda r, v: {"options": r.pairs(sorted(v.items()))}),
    (exactly(types.FunctionType), code_reader.read_function),
    (exactly(types.CodeType), code_reader.read_code),
    (exactly(types.MethodType), lambda r, v: {"method": [r.read(v.__func__), r.read(v.__self__)]}),
    (exactly(types.BuiltinFunctionType, types.MethodWrapperType), _builtin),
    (
        exactly(
            *(types.MethodDescriptorType, types.WrapperDescriptorType),
            *(types.ClassMethodDescriptorType, types.MemberDescriptorType),
            types.GetSetDescriptorType,
        ),
        lambda r, v: {"descriptor": [v.__name__, r.read(v.__objclass__)]},
    ),
    (exactly(staticmethod, classmethod, functools.cached_property), _wrapped),
    (exactly(type(functools.lru_cache(len))), _wrapped),
    (
        exactly(property),
        lambda r, v: {"property": [r.read(v.fget), r.read(v.fset), r.read(v.fdel)]},
    ),
    (exactly(types.MappingProxyType), lambda r, v: {"proxy": r.pairs(v.items())}),
    (exactly(types.CellType), lambda r, v: {"cell": code_reader.read_cell(r, v)}),
    (an(pathlib.PurePath), lambda r, v: {"path": [type(v).__name__, str(v)]}),
    (exactly(logging.Logger, logging.RootLogger), lambda r, v: {"logger": v.name}),
    (exactly(dataclasses.Field), _field),
    (exactly(*_SENTINELS), lambda r, v: {"sentinel": type(v).__qualname__}),
    (_of_torch, _torch),
    (an(types.ModuleType), _module),
    (an(type), code_reader.read_class),
    (an(*_FORMS), _type_form),
)


def plain_base(reader: Reader, value: Any) -> Any:
    """What an instance holds as a number, text or container, for a class derived from one; None for the others."""
    for base in (int, float, complex, str, bytes, bytearray):
        if isinstance(value, base):
            return reader.read(base.__new__(base, _plain_of(base, value)))
    if isinstance(value, dict):
        return reader.pairs(dict.items(value))
    if isinstance(value, (set, frozenset)):
        return reader.unordered(value)
    if isinstance(value, (list, tuple)):
        base = list if isinstance(value, list) else tuple
        return [reader.read(each) for each in base.__iter__(value)]
    return None


def _plain_of(base: type, value: Any) -> Any:
    """The built-in value inside ``value``, past whatever its class overrides."""
    if base is int:
        return int.__add__(value, 0)
    if base is float:
        return float.__pos__(value)
    if base is complex:
        return complex.__pos__(value)
    return base.__getitem__(value, slice(None))
