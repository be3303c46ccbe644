"""The configuration described: in, a model; out, its JSON schema, its table of fields, and the page in docs/ brought up to date.

It knows no field by name: everything comes from the models, so that the page can't drift from the code.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from piecework.errors import ConfigError
from piecework.runtime.config.compilation import CompilationConfig, RuntimeConfig
from piecework.runtime.config.model import FrozenModel, hash_roles, nested_model, other_names
from piecework.runtime.config.text import to_data

DOCUMENTED: tuple[type[FrozenModel], ...] = (CompilationConfig, RuntimeConfig)
_BLOCK = re.compile(r"(<!-- fields of (\w+) -->\n).*?(<!-- end of fields -->)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class FieldRow:
    """One field as it is documented: dotted name, type, default (all as text), cache key, meaning."""

    name: str
    type: str
    default: str
    role: str
    description: str


def field_rows(model: type[FrozenModel], prefix: str = "") -> Iterator[FieldRow]:
    """Every field of ``model`` in order; a group is followed by its own fields."""
    defaults = to_data(model())
    schema = model.model_json_schema()
    roles = hash_roles(model)
    for name, field in model.model_fields.items():
        role = roles[name]
        group = nested_model(field.annotation)
        if group is not None:
            yield from field_rows(group, f"{prefix}{name}.")
            continue
        yield FieldRow(
            name=prefix + name,
            type=_type_text(schema["properties"][name], schema.get("$defs", {})),
            default=_literal(defaults[name]),
            role="?" if role is None else "yes" if role.in_key else f"no: {role.reason}",
            description=field.description or "",
        )


def _literal(value: object) -> str:
    match value:
        case None:
            return "none"
        case bool():
            return str(value).lower()
        case str():
            return value or '""'
        case _:
            return str(value)


def _type_text(schema: dict[str, Any], definitions: dict[str, Any]) -> str:
    """A schema in a few words, such as ``list of integers`` or ``binary or unpacked``."""
    if "$ref" in schema:
        return _type_text(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    if "allOf" in schema:  # how pydantic before 2.9 writes a reference that has a description
        return _type_text(schema["allOf"][0], definitions)
    if "enum" in schema:
        return " or ".join(map(str, schema["enum"]))
    if "const" in schema:
        return f'"{schema["const"]}"'
    if "anyOf" in schema:
        return " or ".join(_type_text(each, definitions) for each in schema["anyOf"])
    kind = schema.get("type")
    if kind == "array":
        return f"list of {_type_text(schema['items'], definitions)}"
    if kind == "object":
        return "table"
    if schema.get("format") == "path":
        return "path"
    return {"null": "none", "boolean": "bool", "integer": "int", "number": "float"}.get(
        str(kind), str(kind)
    )


def json_schema(model: type[FrozenModel]) -> dict[str, Any]:
    """JSON schema of ``model`` with each field's description, default and ``x-cache-key`` role."""
    schema = model.model_json_schema()
    definitions = schema.get("$defs", {})
    _add_roles(model, schema)
    for field in model.model_fields.values():
        group = nested_model(field.annotation)
        if group is not None:
            _add_roles(group, definitions[group.__name__])
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return schema


def _add_roles(model: type[FrozenModel], schema: dict[str, Any]) -> None:
    defaults = to_data(model())
    for name, role in hash_roles(model).items():
        # As a file would hold it: a mode by name, not by number.
        schema["properties"][name]["default"] = defaults[name]
        if role is not None:
            schema["properties"][name]["x-cache-key"] = role.in_key or role.reason
    for alias, name in other_names(model).items():
        # The alias is accepted on input, so a checker of files must accept it too.
        schema["properties"][alias] = {**schema["properties"][name], "deprecated": True}


def markdown_table(model: type[FrozenModel]) -> str:
    """The fields of ``model`` as a Markdown table."""
    lines = [
        "| field | meaning | type; default | in the cache key |",
        "|---|---|---|---|",
    ]
    for row in field_rows(model):
        kind = f"{row.type}; `{row.default}`"
        cells = (f"`{row.name}`", row.description, kind, row.role)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "".join(f"{line}\n" for line in lines)


def update_page(text: str) -> str:
    """A page with the table between each pair of its markers written anew.

    Raises:
        ConfigError: the page has no marker for one of the documented models, or for an unknown one.
    """
    models = {model.__name__: model for model in DOCUMENTED}
    marked = [match[2] for match in _BLOCK.finditer(text)]
    if sorted(marked) != sorted(models):
        raise ConfigError(
            f"the page has tables for {marked}, and there are {sorted(models)}",
            where="docs/configuration.md",
            hint="mark each with <!-- fields of NAME --> and <!-- end of fields -->",
        )
    return _BLOCK.sub(
        lambda match: f"{match[1]}\n{markdown_table(models[match[2]])}\n{match[3]}", text
    )
