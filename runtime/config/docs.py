"""The configuration described from its models alone: JSON schema, table of fields, and the page in docs/."""

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
    """One field as it is documented, all as text: dotted name, default, cache key, meaning."""

    name: str
    default: str
    role: str
    description: str


def field_rows(model: type[FrozenModel], prefix: str = "") -> Iterator[FieldRow]:
    """Every field of ``model`` in order; a group is followed by its own fields."""
    defaults = to_data(model())
    for name, role in hash_roles(model).items():
        group = nested_model(model, name)
        if group is not None:
            yield from field_rows(group, f"{prefix}{name}.")
            continue
        default = defaults[name]
        shown = str(default).lower() if default is None or default in (True, False) else default
        said = "?" if role is None else "yes" if role.in_key else f"no: {role.reason}"
        meaning = model.model_fields[name].description or ""
        yield FieldRow(prefix + name, str(shown) or '""', said, meaning)


def json_schema(model: type[FrozenModel]) -> dict[str, Any]:
    """JSON schema of ``model`` with each field's description, default and ``x-cache-key`` role."""
    schema = model.model_json_schema()
    groups = (nested_model(model, name) for name in model.model_fields)
    for each in (model, *filter(None, groups)):
        properties = (schema if each is model else schema["$defs"][each.__name__])["properties"]
        defaults = to_data(each())  # as a file would hold it: a mode by name, not by number
        for name, role in hash_roles(each).items():
            properties[name]["default"] = defaults[name]
            if role is not None:
                properties[name]["x-cache-key"] = role.in_key or role.reason
        for alias, name in other_names(each).items():
            properties[alias] = {**properties[name], "deprecated": True}
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return schema


def markdown_table(model: type[FrozenModel]) -> str:
    """The fields of ``model`` as a Markdown table."""
    lines = ["| field | default | meaning | in the cache key |", "|---|---|---|---|"]
    for row in field_rows(model):
        # Why a field is not in the key is in the schema, and in `piecework config schema`.
        cells = (f"`{row.name}`", f"`{row.default}`", row.description, row.role.partition(":")[0])
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "".join(f"{line}\n" for line in lines)


def update_page(text: str) -> str:
    """A page with the table between each pair of its markers written anew.

    Raises:
        ConfigError: the page lacks the marker of a documented model, or has one of another.
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
