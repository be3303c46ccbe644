"""The part of the cache's key that comes from the configuration: in, a model; out, text by field and its SHA-256.

It never hashes an address, a path or an iteration order, and it never guesses: what has no stable form is an error.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import inspect
import json
import types
from collections.abc import Mapping
from typing import Any

from piecework.errors import ConfigError
from piecework.runtime.config_model import FrozenMap, FrozenModel, hash_roles
from piecework.runtime.qualified_name import import_qualified


def factors_of(model: FrozenModel) -> dict[str, str]:
    """Each field whose role is KEY as canonical JSON, by dotted name; groups and options one level down.

    A pass counts by its content: its source, or its ``uuid()``.

    Raises:
        ConfigError: a field declares no role, or a value has no stable form.
    """
    factors: dict[str, str] = {}
    for name, role in hash_roles(type(model)).items():
        if role is None:
            raise ConfigError(
                "the field does not say whether it is part of the cache key",
                where=f"{type(model).__name__}.{name}",
                hint="annotate it with KEY or ignored(reason)",
            )
        if not role.in_key:
            continue
        value = getattr(model, name)
        if isinstance(value, FrozenModel):
            factors |= {f"{name}.{key}": text for key, text in factors_of(value).items()}
        elif isinstance(value, FrozenMap):
            for key, each in sorted(value.items()):
                where = f"{name}.{key}"
                if name == "inductor_passes" and isinstance(each, str):
                    each = import_qualified(each, where=where)
                factors[where] = _text(canonical(each, where))
        else:
            plain = canonical(value, name)
            if role.unordered and isinstance(plain, list):
                plain = sorted(set(plain))
            factors[name] = _text(plain)
    return factors


def digest(factors: Mapping[str, str]) -> str:
    """SHA-256 (hex) of named texts, independent of their order."""
    return hashlib.sha256(_text(dict(factors)).encode()).hexdigest()


def canonical(value: Any, where: str) -> Any:
    """``value`` as plain JSON data that is equal wherever and whenever the value is.

    Raises:
        ConfigError: it has no stable form; the error names the field.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, (int, float)):
        return value
    if isinstance(value, (tuple, list)):
        return [canonical(item, where) for item in value]
    if isinstance(value, (set, frozenset)):
        return {"set": sorted(_text(canonical(item, where)) for item in value)}
    if isinstance(value, Mapping):
        return {str(key): canonical(item, f"{where}.{key}") for key, item in value.items()}
    return _identity_of_code(value, where)


def _identity_of_code(value: Any, where: str) -> Any:
    """What a callable does, as data: its own ``uuid()``, or its source and what it closes over."""
    uuid = getattr(value, "uuid", None)
    if callable(uuid) and not isinstance(value, type):
        return {"uuid": canonical(uuid(), where)}
    if isinstance(value, functools.partial):
        parts = (value.func, value.args, dict(sorted(value.keywords.items())))
        return {"partial": [canonical(part, where) for part in parts]}
    if isinstance(value, types.FunctionType):
        closed_over = inspect.getclosurevars(value).nonlocals
        return {
            "source": _source_digest(value, where),
            "defaults": canonical((value.__defaults__, value.__kwdefaults__), where),
            "closure": canonical(dict(sorted(closed_over.items())), where),
        }
    if isinstance(value, type):
        return {"source": _source_digest(value, where)}
    raise ConfigError(
        f"{type(value).__qualname__} object has no stable form, so it can't be part of the cache key",
        where=where,
        hint="give it a method uuid() that returns a string, or name a function",
    )


def _source_digest(value: Any, where: str) -> str:
    try:
        source = inspect.getsource(value)
    except (OSError, TypeError) as error:
        raise ConfigError(
            f"the source of {value.__qualname__} can't be read, so it can't be part of the cache key",
            where=where,
            hint="define it in a file, or give it a method uuid()",
        ) from error
    return hashlib.sha256(source.encode()).hexdigest()


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
