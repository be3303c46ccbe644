"""Configurations as JSON, TOML and ``-O`` options, read and written; their fields described."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic_core import PydanticSerializationError

from piecework.errors import ConfigError
from piecework.runtime.config.model import FrozenModel, group_of, is_keyed

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def to_data(config: FrozenModel, *, only_changed: bool = False) -> dict[str, Any]:
    """``config`` as plain JSON data in the order of its fields, or what is not at its default."""
    data: dict[str, Any] = {}
    for name in type(config).model_fields:
        try:
            data |= config.model_dump(mode="json", include={name}, exclude_defaults=only_changed)
        except PydanticSerializationError as error:
            raise ConfigError(f"can't be written: {error}", where=name) from None
    return data


def to_json(config: FrozenModel, *, only_changed: bool = False) -> str:
    return json.dumps(to_data(config, only_changed=only_changed), indent=2, ensure_ascii=False)


def to_toml(config: FrozenModel, *, only_changed: bool = False) -> str:
    """``config`` as TOML, groups as tables; it has no null, which is what is left out means."""
    data = to_data(config, only_changed=only_changed)
    plain = {n: each for n, each in data.items() if not isinstance(each, (dict, type(None)))}
    tables = {n: each for n, each in data.items() if isinstance(each, dict)}
    blocks = [("", plain)] if plain else []
    blocks += [(f"[{name}]\n", table) for name, table in tables.items()]
    return "\n".join(
        head + "".join(f"{_toml_key(name)} = {_toml(value)}\n" for name, value in table.items())
        for head, table in blocks
    )


def _toml_key(name: str) -> str:
    return name if _BARE_KEY.fullmatch(name) else _toml(name)


def _toml(value: Any) -> str:
    if value is None:
        raise ConfigError("TOML can't hold null", hint="write JSON instead")
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml_key(k)} = {_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    # JSON's other values are TOML's; DEL is the one character that only TOML wants escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def read_data(path: Path) -> dict[str, Any]:
    """The fields in a ``.json`` or ``.toml`` file, not yet validated."""
    import tomllib  # few configurations are files

    parse = {".json": json.loads, ".toml": tomllib.loads}.get(path.suffix.lower())
    try:
        if parse is None:
            raise ValueError(f"its name must end in .json or .toml, not {path.suffix!r}")
        data = parse(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict):
            raise ValueError("a configuration is an object of fields")
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"the file can't be read: {error}",
            where=str(path),
            hint="`piecework config show` prints one as TOML, with --format json as JSON",
        ) from None
    return data


def parse_overrides(
    model: type[FrozenModel], texts: Iterable[str], *, flag: str = "-O"
) -> dict[str, Any]:
    """The data that the values of one option mean, the last one winning; the model validates it.

    Each text is ``.field=value`` (one dot more reaches into a group or a table of options, whose
    names may have dots), a mode's number as in ``-O3``, or a JSON object of fields.
    """
    data: dict[str, Any] = {}
    for text in (each.removeprefix(flag).strip() for each in texts):
        name, equals, value = text.partition("=")
        field, dot, rest = name.removeprefix(".").partition(".")
        if isinstance(given := _value(text), dict):
            data = merge(data, given)
        elif text.isdecimal() and "mode" in model.model_fields:
            data["mode"] = int(text)
        elif equals and name.startswith(".") and field and bool(dot) == bool(rest):
            data = merge(data, {field: {rest: _value(value)} if rest else _value(value)})
        else:
            raise ConfigError(f"is not of the form {flag}.field=value", where=flag + text)
    return data


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """``below`` (a file's fields) with ``above`` (options) on top; groups and options by key."""
    merged = dict(below)
    for name, value in above.items():
        old = merged.get(name)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[name] = {**old, **value} if both else value  # type: ignore[dict-item]
    return merged


def to_overrides(config: FrozenModel, *, flag: str = "-O") -> list[str]:
    """The options that give ``config`` when nothing else is given, one for each changed field."""
    options = []
    for name, value in to_data(config, only_changed=True).items():
        for inner, each in value.items() if isinstance(value, dict) else [("", value)]:
            text = json.dumps(each, ensure_ascii=False, separators=(",", ":"))
            if isinstance(each, str) and _value(each) == each == each.strip():
                text = each  # bare where that reads back as the same string
            if isinstance(value, dict) and not re.fullmatch(r"[\w-]+(\.[\w-]+)*", inner):
                options.append(flag + json.dumps({name: {inner: each}}, ensure_ascii=False))
            else:
                options.append(f"{flag}.{name}{inner and '.' + inner}={text}")
    return options


class FieldRow(NamedTuple):
    """One field as it is documented, all as text."""

    name: str
    default: str
    role: str  # whether it is in the cache key
    description: str


def field_rows(model: type[FrozenModel], prefix: str = "") -> Iterator[FieldRow]:
    """Every field of ``model`` in order; a group is followed by its own fields."""
    defaults = to_data(model())
    for name, field in model.model_fields.items():
        group = group_of(model, name)
        if group is not None:
            yield from field_rows(group, f"{prefix}{name}.")
            continue
        default = defaults[name]
        shown = str(default).lower() if default is None or default in (True, False) else default
        role = "yes" if is_keyed(field) else "no"
        yield FieldRow(prefix + name, str(shown) or '""', role, field.description or "")


def json_schema(model: type[FrozenModel]) -> dict[str, Any]:
    """pydantic's JSON schema of ``model``; each field has its role in the cache key."""
    schema = model.model_json_schema(by_alias=False)
    for name, default in to_data(model()).items():  # as a file would hold it: a mode by name
        schema["properties"][name]["default"] = default
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def markdown_table(model: type[FrozenModel]) -> str:
    lines = ["| field | default | meaning | in the cache key |", "|---|---|---|---|"]
    for row in field_rows(model):
        cells = (f"`{row.name}`", f"`{row.default}`", row.description, row.role)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "".join(f"{line}\n" for line in lines)
