"""The configuration described from its models alone: schema, table of fields, the page in docs/."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from piecework.errors import ConfigError
from piecework.runtime.config.compilation import CompilationConfig, RuntimeConfig
from piecework.runtime.config.model import CACHE_KEY, FrozenModel, group_of
from piecework.runtime.config.text import to_data

DOCUMENTED: dict[str, type[FrozenModel]] = {
    "CompilationConfig": CompilationConfig,
    "RuntimeConfig": RuntimeConfig,
}
_BLOCK = re.compile(r"(<!-- fields of (\w+) -->\n).*?(<!-- end of fields -->)", re.DOTALL)


class FieldRow(NamedTuple):
    """One field as it is documented, all as text."""

    name: str
    default: str
    role: str
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
        reason = field.json_schema_extra[CACHE_KEY]  # type: ignore[index]
        role = "yes" if reason is True else f"no: {reason}"
        yield FieldRow(prefix + name, str(shown) or '""', role, field.description or "")


def json_schema(model: type[FrozenModel]) -> dict[str, Any]:
    """pydantic's JSON schema of ``model``; each field has its role in the cache key."""
    schema = model.model_json_schema(by_alias=False)
    for name, default in to_data(model()).items():  # as a file would hold it: a mode by name
        schema["properties"][name]["default"] = default
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


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
    marked = [match[2] for match in _BLOCK.finditer(text)]
    if sorted(marked) != sorted(DOCUMENTED):
        raise ConfigError(
            f"the page has tables for {marked}, and there are {sorted(DOCUMENTED)}",
            hint="mark each with <!-- fields of NAME --> and <!-- end of fields -->",
        )
    return _BLOCK.sub(
        lambda match: f"{match[1]}\n{markdown_table(DOCUMENTED[match[2]])}\n{match[3]}", text
    )
