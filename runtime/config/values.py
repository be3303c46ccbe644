"""The value types of configuration fields: what a person or a file wrote becomes one immutable value."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainSerializer,
    PlainValidator,
    WithJsonSchema,
)

from piecework.errors import ConfigError
from piecework.runtime.batch.sizes import LARGEST
from piecework.runtime.config.frozen_map import FrozenMap
from piecework.runtime.config.qualified_name import QUALIFIED_NAME, qualified_name

CAPTURE_SIZES = "cudagraph_capture_sizes"
_OP_NAME = re.compile(r"[A-Za-z_]\w*::[A-Za-z_]\w*(\.[A-Za-z_]\w*)?")
_SURROGATE = re.compile(r"[\ud800-\udfff]")


def _as_list(value: Any) -> Any:
    """A comma-separated string or a lone number, as one writes it on a command line, as a list."""
    if isinstance(value, str):
        parts = [part.strip() for part in value.split(",") if part.strip()]
        return [int(part) if part.isdecimal() else part for part in parts]
    if isinstance(value, int) and not isinstance(value, bool):
        return [value]
    return value


def _sorted_unique(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Numbers ascending, then names; each once."""
    return tuple(sorted(set(values), key=lambda each: (isinstance(each, str), each)))


def _each_once(values: tuple[int, ...]) -> tuple[int, ...]:
    twice = sorted(value for value, times in Counter(values).items() if times > 1)
    if twice:
        raise ValueError(f"given more than once: {', '.join(map(str, twice))}")
    return tuple(sorted(values))


def _size_or_capture_sizes(value: Any) -> int | str:
    if value == CAPTURE_SIZES or (type(value) is int and 0 < value < 2**63):
        return value
    raise ValueError(f"must be a positive whole number or {CAPTURE_SIZES!r}, not {value!r}")


def _op_name(value: Any) -> str:
    """The name of an op given by name, as an overload, a packet or a handle of `piecework.splitting_op`.

    torch prints an overload as ``ns.op.overload`` and a packet as ``ns.op``.
    """
    value = getattr(value, "splitting_op_name", value)
    text = value if isinstance(value, str) else str(value).replace(".", "::", 1)
    if not _OP_NAME.fullmatch(text):
        raise ValueError(f"an op is written ns::op or ns::op.overload, not {value!r}")
    return text


def _custom_ops(rules: tuple[str, ...]) -> tuple[str, ...]:
    """Check ``all``/``none``/``+op``/``-op``; every fault is named (F3)."""
    faults = [
        f"{rule!r} is not 'all', 'none', '+op' or '-op'"
        for rule in rules
        if rule not in ("all", "none") and not re.fullmatch(r"[+-][\w.:]+", rule)
    ]
    if {"all", "none"} <= set(rules):
        faults.append("'all' and 'none' are both given")
    faults += [f"given more than once: {base}" for base in ("all", "none") if rules.count(base) > 1]
    both = sorted({rule[1:] for rule in rules if rule[0] == "+" and f"-{rule[1:]}" in rules})
    faults += [f"'+{name}' and '-{name}' are both given" for name in both]
    if faults:
        raise ValueError("; ".join(faults))
    return tuple(dict.fromkeys(rules))


def _passes(value: Mapping[str, Any]) -> FrozenMap:
    faults = [
        f"{name!r} must be a callable or a qualified name, not {each!r}"
        for name, each in value.items()
        if not (QUALIFIED_NAME.fullmatch(each) if isinstance(each, str) else callable(each))
    ]
    if faults:
        raise ValueError("; ".join(faults))
    return FrozenMap(value)


def _backend(value: str) -> str:
    if value.isidentifier() or QUALIFIED_NAME.fullmatch(value):
        return value
    raise ValueError(f"must be a compiler's name or a qualified name, not {value!r}")


def _plain_passes(value: Mapping[str, Any]) -> dict[str, str]:
    named: dict[str, str] = {}
    for slot, each in value.items():
        try:
            named[slot] = qualified_name(each)
        except ValueError as error:
            hint = "name an importable function"
            raise ConfigError(str(error), where=f".{slot}", hint=hint) from None
    return named


def _plain(value: Any, where: str = "") -> Any:
    """An option's value as JSON data that reads back as an equal value."""
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(each, f"{where}.{key}") for key, each in value.items()}
    if isinstance(value, tuple):
        return [_plain(each, where) for each in value]
    text = isinstance(value, str) and not _SURROGATE.search(value)
    number = isinstance(value, (bool, int)) or (isinstance(value, float) and math.isfinite(value))
    if value is None or text or number:
        return value
    raise ConfigError(
        f"{value!r} can't be written to a file and read back",
        where=where,
        hint="use strings, finite numbers, booleans, lists and tables",
    )


def has_op(names: Iterable[str], op: str) -> bool:
    """Whether ``op`` is named, itself or by ``ns::op``, which stands for every overload."""
    listed = set(names)
    return op in listed or op.partition(".")[0] in listed


PositiveInt = Annotated[int, Field(strict=True, gt=0)]
CaptureSize = Annotated[int, Field(strict=True, gt=0, le=LARGEST)]
CaptureSizes = Annotated[
    tuple[CaptureSize, ...], BeforeValidator(_as_list), AfterValidator(_sorted_unique)
]
QueryLens = Annotated[
    tuple[PositiveInt, ...], BeforeValidator(_as_list), AfterValidator(_sorted_unique)
]
Endpoints = Annotated[
    tuple[PositiveInt, ...], BeforeValidator(_as_list), AfterValidator(_each_once)
]
CompileSize = Annotated[
    int | str,
    PlainValidator(_size_or_capture_sizes),
    WithJsonSchema(
        {"anyOf": [{"type": "integer", "exclusiveMinimum": 0}, {"const": CAPTURE_SIZES}]}
    ),
]
CompileSizes = Annotated[
    tuple[CompileSize, ...], BeforeValidator(_as_list), AfterValidator(_sorted_unique)
]
OpName = Annotated[
    str,
    PlainValidator(_op_name),
    WithJsonSchema({"type": "string", "pattern": f"^{_OP_NAME.pattern}$"}),
]
OpNames = Annotated[tuple[OpName, ...], BeforeValidator(_as_list)]
CustomOps = Annotated[tuple[str, ...], BeforeValidator(_as_list), AfterValidator(_custom_ops)]
Options = Annotated[
    Mapping[str, Any],
    AfterValidator(FrozenMap),
    PlainSerializer(lambda value: _plain(value), when_used="json"),
]
Passes = Annotated[
    Mapping[str, Any],
    AfterValidator(_passes),
    PlainSerializer(_plain_passes, when_used="json"),
    WithJsonSchema({"type": "object", "additionalProperties": {"type": "string"}}),
]
BackendName = Annotated[str, AfterValidator(_backend)]
