"""Configurations as text: in, JSON or TOML, or a model; out, the other one, equal after a round trip.

It never fills in defaults of its own, and it refuses to write what could not be read back.
"""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from piecework.errors import ConfigError
from piecework.runtime.config.model import FrozenModel
from piecework.runtime.config.qualified_name import qualified_name
from piecework.runtime.identity.frozen_map import FrozenMap

Model = TypeVar("Model", bound=FrozenModel)

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
# After a text that is no configuration.
_WRITTEN = "`piecework config show` prints one as TOML, with --format json as JSON"
_SURROGATE = re.compile(r"[\ud800-\udfff]")


def to_data(config: FrozenModel, *, only_changed: bool = False) -> dict[str, Any]:
    """``config`` as plain JSON data, in the order of its fields.

    Args:
        config: any configuration model.
        only_changed: leave out what is at its default.

    Raises:
        ConfigError: an option or a pass can't be written (an object, a lambda, an infinite number).
    """
    dumped: dict[str, Any] = {}
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if only_changed and value == field.get_default():
            continue
        if isinstance(value, FrozenModel):
            dumped[name] = to_data(value, only_changed=only_changed)
        elif name == "inductor_passes":
            dumped[name] = {slot: _named(each, f"{name}.{slot}") for slot, each in value.items()}
        elif isinstance(value, FrozenMap):
            dumped[name] = {key: _plain(each, f"{name}.{key}") for key, each in value.items()}
        else:
            dumped[name] = config.model_dump(mode="json", include={name})[name]
    return dumped


def _named(value: Any, where: str) -> str:
    """A pass by its name; read back, the name stands for the same callable."""
    try:
        return qualified_name(value)
    except ValueError as error:
        raise ConfigError(str(error), where=where, hint="name an importable function") from None


def _plain(value: Any, where: str) -> Any:
    """An option's value as JSON data that reads back as an equal value."""
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, str) and not _SURROGATE.search(value):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, tuple):
        return [_plain(item, where) for item in value]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(item, f"{where}.{key}") for key, item in value.items()}
    raise ConfigError(
        f"{value!r} can't be written to a file and read back",
        where=where,
        hint="use strings, finite numbers, booleans, lists and tables",
    )


def to_json(config: FrozenModel, *, only_changed: bool = False) -> str:
    """``config`` as indented JSON; errors as :func:`to_data`."""
    return json.dumps(to_data(config, only_changed=only_changed), indent=2, ensure_ascii=False)


def from_json(model: type[Model], text: str, *, where: str = "JSON") -> Model:
    """The ``model`` written in ``text``.

    Raises:
        ConfigError: the text is no JSON object, or its fields are unknown, wrong or in conflict.
    """
    return model.from_data(parse_json(text, where=where))


def parse_json(text: str, *, where: str) -> dict[str, Any]:
    """The JSON object in ``text``; a key that is given twice is an error."""
    try:
        data = json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"no valid JSON: {error}", where=where, hint=_WRITTEN) from None
    if not isinstance(data, dict):
        raise ConfigError("a configuration is a JSON object of fields", where=where, hint=_WRITTEN)
    return data


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"given more than once: {', '.join(twice)}")
    return data


def to_toml(config: FrozenModel, *, only_changed: bool = False) -> str:
    """``config`` as TOML, groups and options as tables.

    TOML has no null: a field that is None is left out, and None is what it is by default.

    Raises:
        ConfigError: as :func:`to_data`, or an option's value is None.
    """
    data = to_data(config, only_changed=only_changed)
    lines = []
    for name, value in data.items():
        if value is not None and not isinstance(value, dict):
            lines.append(f"{name} = {_toml_value(value, name)}")
    for name, value in data.items():
        if isinstance(value, dict):
            lines += ["", f"[{name}]"] if lines else [f"[{name}]"]
            lines += [
                f"{_toml_key(key)} = {_toml_value(each, f'{name}.{key}')}"
                for key, each in value.items()
            ]
    return "".join(f"{line}\n" for line in lines)


def from_toml(model: type[Model], text: str, *, where: str = "TOML") -> Model:
    """The ``model`` written in ``text``; errors as :func:`from_json`."""
    return model.from_data(parse_toml(text, where=where))


def parse_toml(text: str, *, where: str) -> dict[str, Any]:
    """The TOML document in ``text``.

    Raises:
        ConfigError: the text is no TOML; the message has the line.
    """
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"no valid TOML: {error}", where=where, hint=_WRITTEN) from None


def _toml_key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else _toml_string(key)


def _toml_string(text: str) -> str:
    # JSON's escapes are TOML's; DEL is the one character that only TOML wants escaped.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _toml_value(value: Any, where: str) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case int() | float():
            return repr(value)
        case str():
            return _toml_string(value)
        case list():
            return "[" + ", ".join(_toml_value(item, where) for item in value) + "]"
        case dict():
            pairs = (f"{_toml_key(k)} = {_toml_value(v, f'{where}.{k}')}" for k, v in value.items())
            return "{" + ", ".join(pairs) + "}"
        case _:
            raise ConfigError("TOML can't hold null", where=where, hint="write JSON instead")


def read_data(path: Path) -> dict[str, Any]:
    """The fields in a ``.json`` or ``.toml`` file, not yet validated.

    Raises:
        ConfigError: the file can't be read, has another suffix, or is not what its suffix says.
    """
    parsers = {".json": parse_json, ".toml": parse_toml}
    parse = parsers.get(path.suffix.lower())
    if parse is None:
        raise ConfigError(
            f"a configuration file ends in .json or .toml, not {path.suffix!r}", where=str(path)
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the file can't be read: {error}", where=str(path)) from None
    return parse(text, where=str(path))
