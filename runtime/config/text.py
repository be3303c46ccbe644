"""Configurations as text: JSON, TOML and ``-O`` options, each read and written, equal after a round trip."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic_core import PydanticSerializationError

from piecework.errors import ConfigError, ConfigProblem
from piecework.runtime.config.model import FrozenModel, nested_model, other_names, report

Model = TypeVar("Model", bound=FrozenModel)

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_DOTTED = re.compile(r"[\w-]+(\.[\w-]+)*")
_WRITTEN = "`piecework config show` prints one as TOML, with --format json as JSON"

# --- JSON and TOML -------------------------------------------------------------------------------


def to_data(config: FrozenModel, *, only_changed: bool = False) -> dict[str, Any]:
    """``config`` as plain JSON data, in the order of its fields.

    Args:
        config: any configuration model.
        only_changed: leave out what is at its default.

    Raises:
        ConfigError: an option or a pass can't be written (an object, a lambda, an infinite number).
    """
    data: dict[str, Any] = {}
    for name in type(config).model_fields:
        try:
            data |= config.model_dump(mode="json", include={name}, exclude_defaults=only_changed)
        except PydanticSerializationError as error:
            cause = error.__cause__
            if not isinstance(cause, ConfigError):
                raise ConfigError(str(error), where=name) from None
            where = f"{name}{cause.where or ''}"
            raise ConfigError(cause.message, where=where, hint=cause.hint) from None
    return data


def to_json(config: FrozenModel, *, only_changed: bool = False) -> str:
    """``config`` as indented JSON; errors as :func:`to_data`."""
    return json.dumps(to_data(config, only_changed=only_changed), indent=2, ensure_ascii=False)


def from_json(model: type[Model], text: str, *, where: str = "JSON") -> Model:
    """The ``model`` written in ``text``; what is wrong with it is one ConfigError."""
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
    names = [name for name, _ in pairs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"given more than once: {', '.join(twice)}")
    return dict(pairs)


def to_toml(config: FrozenModel, *, only_changed: bool = False) -> str:
    """``config`` as TOML, groups and options as tables.

    TOML has no null: a field that is None is left out, and None is what it is by default.

    Raises:
        ConfigError: as :func:`to_data`, or an option's value is None.
    """
    data = to_data(config, only_changed=only_changed)
    tables = {name: value for name, value in data.items() if isinstance(value, dict)}
    plain = {n: each for n, each in data.items() if n not in tables and each is not None}
    blocks = [_toml_lines(plain)] if plain else []
    blocks += [f"[{name}]\n{_toml_lines(table, name)}" for name, table in tables.items()]
    return "\n".join(blocks)


def _toml_lines(table: Mapping[str, Any], where: str = "") -> str:
    return "".join(f"{_toml_key(k)} = {_toml_value(v, where or k)}\n" for k, v in table.items())


def _toml_key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else _toml_value(key, key)


def _toml_value(value: Any, where: str) -> str:
    match value:
        case str():  # JSON's escapes are TOML's; DEL is the one that only TOML wants escaped
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        case bool():
            return str(value).lower()
        case int() | float():
            return repr(value)
        case list():
            return "[" + ", ".join(_toml_value(item, where) for item in value) + "]"
        case dict():
            pairs = (f"{_toml_key(k)} = {_toml_value(v, where)}" for k, v in value.items())
            return "{" + ", ".join(pairs) + "}"
    raise ConfigError("TOML can't hold null", where=where, hint="write JSON instead")


def from_toml(model: type[Model], text: str, *, where: str = "TOML") -> Model:
    """The ``model`` written in ``text``; what is wrong with it is one ConfigError."""
    return model.from_data(parse_toml(text, where=where))


def parse_toml(text: str, *, where: str) -> dict[str, Any]:
    """The TOML document in ``text``; the error of one that is none has the line."""
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"no valid TOML: {error}", where=where, hint=_WRITTEN) from None


def read_data(path: Path) -> dict[str, Any]:
    """The fields in a ``.json`` or ``.toml`` file, not yet validated.

    Raises:
        ConfigError: the file can't be read, has another suffix, or is not what its suffix says.
    """
    parse = {".json": parse_json, ".toml": parse_toml}.get(path.suffix.lower())
    if parse is None:
        raise ConfigError(
            f"a configuration file ends in .json or .toml, not {path.suffix!r}", where=str(path)
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the file can't be read: {error}", where=str(path)) from None
    return parse(text, where=str(path))


# --- options of a command line -------------------------------------------------------------------


def parse_overrides(
    model: type[FrozenModel], texts: Iterable[str], *, flag: str = "-O"
) -> dict[str, Any]:
    """Nested data from the values of one option, in any order; the model validates it.

    Each text is ``.field=value`` (dots reach into groups; below a table of options the rest of the
    path is one key), a mode's number as in ``-O3``, or a JSON object of fields. A value is JSON
    where it reads as JSON, else a string as it stands; lists may be written with commas.

    Raises:
        ConfigError: a text has another form, or a field is given twice; all such are listed.

    Example:
        >>> parse_overrides(CompilationConfig, ["3", ".stitching_config.emit_del=false"])
        {'mode': 3, 'stitching_config': {'emit_del': False}}
    """
    data: dict[str, Any] = {}
    problems: list[ConfigProblem] = []
    for text in (each.removeprefix(flag).strip() for each in texts):
        try:
            given = _assignments(model, text, flag)
        except ConfigError as error:
            problems.append(ConfigProblem(error.where or text, error.message))
            continue
        for path, value in given:
            if not _place(data, path, value):
                problems.append(ConfigProblem(".".join(path), "is given more than once"))
    if problems:
        raise report(f"the {flag} options", problems)
    return data


_Names = tuple[str, ...]


def _assignments(model: type[FrozenModel], text: str, flag: str) -> list[tuple[_Names, Any]]:
    """The (path, value) pairs that one text gives."""
    if text.startswith("{"):
        return list(_leaves(model, parse_json(text, where=text)))
    if text.isdecimal() and "mode" in model.model_fields:
        return [(("mode",), int(text))]
    name, equals, value = text.partition("=")
    field, *rest = name.removeprefix(".").split(".")
    if not (equals and name.startswith(".") and field and all(rest)):
        raise ConfigError(f"is not of the form {flag}.field=value", where=flag + text)
    field = other_names(model).get(field, field)
    if rest and _is_options(model, field):
        rest = [".".join(rest)]  # an option's name keeps its dots
    return [((field, *rest), _value(value))]


def _leaves(model: type[FrozenModel], data: Mapping[str, Any]) -> Iterator[tuple[_Names, Any]]:
    """The fields of ``data``, those of groups and options one by one, so that they merge."""
    for name, value in data.items():
        field = other_names(model).get(name, name)
        inner = nested_model(model, field) is not None or _is_options(model, field)
        if inner and isinstance(value, Mapping):
            yield from (((field, key), each) for key, each in value.items())
        else:
            yield (field,), value


def _is_options(model: type[FrozenModel], name: str) -> bool:
    field = model.model_fields.get(name)
    return field is not None and isinstance(field.default, Mapping)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _place(data: dict[str, Any], path: Sequence[str], value: Any) -> bool:
    """Put ``value`` at ``path``; False if something is there already."""
    *parents, last = path
    for name in parents:
        data = data.setdefault(name, {})
        if not isinstance(data, dict):
            return False
    if last in data:
        return False
    data[last] = value
    return True


def merge(
    model: type[FrozenModel], below: Mapping[str, Any], above: Mapping[str, Any]
) -> dict[str, Any]:
    """``below`` (a file's fields) with ``above`` (overrides) on top; groups and options by key."""
    aliases = other_names(model)
    # Both names of a field in one file stay apart, so that validation reports them.
    merged = {n if aliases.get(n, n) in below else aliases.get(n, n): v for n, v in below.items()}
    for name, value in above.items():
        old = merged.get(name)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[name] = {**old, **value} if both else value  # type: ignore[dict-item]
    return merged


def to_overrides(config: FrozenModel, *, flag: str = "-O") -> list[str]:
    """The options that give ``config`` when nothing else is given, one for each changed field.

    Raises:
        ConfigError: an option or a pass can't be written as text.
    """
    changed = to_data(config, only_changed=True)
    return [_option(flag, path, value) for path, value in _leaves(type(config), changed)]


def _option(flag: str, path: Sequence[str], value: Any) -> str:
    dotted = ".".join(path)
    if not _DOTTED.fullmatch(dotted):
        # A table's key can be any text; one that dots and = can't carry goes as a JSON object.
        for name in reversed(path):
            value = {name: value}
        return flag + _compact(value)
    # Bare where that reads back as the same string, which is how a person would write it.
    bare = isinstance(value, str) and _value(value) == value and value == value.strip()
    return f"{flag}.{dotted}={value if bare else _compact(value)}"


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
