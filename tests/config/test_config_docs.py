"""The documented configuration: the page is current, its examples are true, and the schema describes every field."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from piecework.errors import ConfigError
from piecework.runtime.config.compilation import CompilationConfig, RuntimeConfig
from piecework.runtime.config.text import field_rows, json_schema, markdown_table, to_data

DOCUMENTED = (CompilationConfig, RuntimeConfig)
PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def code_blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("model", DOCUMENTED)
def test_the_page_is_current(model):
    table = f"<!-- fields of {model.__name__} -->\n\n{markdown_table(model)}\n<!-- end"
    runtime = " --runtime" if model is RuntimeConfig else ""
    assert table in PAGE.read_text(
        encoding="utf-8"
    ), f"paste what this prints: piecework config schema --markdown{runtime}"


@pytest.mark.parametrize("model", DOCUMENTED)
def test_every_field_has_a_row_with_all_cells(model):
    rows = list(field_rows(model))
    assert {row.name.partition(".")[0] for row in rows} == set(model.model_fields)
    assert all(row.default and row.description.endswith(".") and row.role for row in rows)
    lines = markdown_table(model).splitlines()
    assert {line.count(" | ") for line in lines if "---" not in line} == {3}


@pytest.mark.parametrize("model", DOCUMENTED)
def test_the_schema_describes_every_field(model):
    schema = json_schema(model)
    groups = [schema] + [each for each in schema.get("$defs", {}).values() if "properties" in each]
    defaults = to_data(model())
    for group in groups:
        assert group["additionalProperties"] is False
        for name, entry in group["properties"].items():
            assert entry["description"] and "default" in entry, name
            assert isinstance(entry["x-cache-key"], bool), name
    for name, value in defaults.items():
        assert schema["properties"][name]["default"] == value


def test_the_toml_example_is_valid():
    (example,) = code_blocks("toml")
    config = CompilationConfig.model_validate(tomllib.loads(example))
    assert config.inductor_compile_config["triton.unique_kernel_names"] is True
    assert not config.stitching_config.emit_del


def test_the_example_of_an_error_is_what_is_printed():
    with pytest.raises(ConfigError) as caught:
        CompilationConfig(compile_size=[1], custom_ops=["+silu", "-silu"])
    text = PAGE.read_text(encoding="utf-8")
    for line in str(caught.value).splitlines():
        assert line in text
