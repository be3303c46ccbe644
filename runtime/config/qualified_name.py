"""Python objects by name: a callable as ``module:name``, and back."""

from __future__ import annotations

import pkgutil
import re
from collections.abc import Callable
from typing import Any

from piecework.errors import ConfigError

# ``package.module:name.attribute``, or dots throughout.
QUALIFIED_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*[.:][A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def qualified_name(value: str | Callable[..., Any]) -> str:
    """How a callable is written in a file: ``module:name``; a string stays as it is.

    Raises:
        ValueError: it has no name that can be imported (a lambda, a local function, an object).
    """
    if isinstance(value, str):
        return value
    module = getattr(value, "__module__", None)
    name = getattr(value, "__qualname__", None)
    if not module or not name or "<" in name or module == "__main__":
        raise ValueError(f"{value!r} has no importable name, so it can't be written to a file")
    return f"{module}:{name}"


def import_qualified(name: str, *, where: str) -> Any:
    """The object that ``name`` points to: ``module:name`` or ``module.name``, nested names included.

    Args:
        name: the qualified name.
        where: the field it comes from, for the error.

    Raises:
        ConfigError: the module can't be imported or has no such name.
    """
    try:
        return pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"{name!r} can't be imported: {error}",
            where=where,
            hint="write package.module:name, and put the package on the Python path",
        ) from error
