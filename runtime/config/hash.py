"""The part of the cache's key that comes from the configuration: in, a model; out, text by field and its SHA-256.

It never hashes a field that is declared as ignored, and it never lets one pass that declares nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from piecework.errors import ConfigError
from piecework.runtime.config.model import FrozenModel, hash_roles
from piecework.runtime.config.qualified_name import import_qualified
from piecework.runtime.identity.frozen_map import FrozenMap
from piecework.runtime.identity.values import canonical, text_of


def factors_of(model: FrozenModel) -> dict[str, str]:
    """Each field whose role is KEY as canonical JSON, by dotted name; groups and options one level down.

    A value counts with its exact type and a pass by what it does, see `piecework.runtime.identity.values`.

    Raises:
        ConfigError: a field declares no role.
        Unidentifiable: a value has no stable form.
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
                factors[where] = _shown(text_of(canonical(each, where)))
        else:
            if role.unordered and isinstance(value, tuple):
                value = tuple(sorted(set(value)))
            factors[name] = _shown(text_of(canonical(value, name)))
    return factors


def _shown(text: str) -> str:
    """``text`` if people can read it, else its digest, which no such text begins like."""
    return (
        text if len(text) <= 200 else f"sha256:{hashlib.sha256(text.encode('ascii')).hexdigest()}"
    )


def digest(factors: Mapping[str, str]) -> str:
    """SHA-256 (hex) of named texts, independent of their order."""
    return hashlib.sha256(text_of(dict(factors)).encode()).hexdigest()
