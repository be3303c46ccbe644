"""No setting does nothing: each field is read where something goes by it, or its idle value is refused with a reason."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import piecework
from piecework.errors import ConfigError, InputError, StaticGraphError
from piecework.runtime.config.compilation import (
    CompilationConfig,
    DynamicShapesConfig,
    PassConfig,
    RuntimeConfig,
    StitchingConfig,
)

RUNTIME = Path(piecework.__file__).parent / "runtime"
CODE = "\n".join(each.read_text() for each in RUNTIME.rglob("*.py"))
MODELS = (CompilationConfig, PassConfig, DynamicShapesConfig, StitchingConfig, RuntimeConfig)
# Fields with one value: any other is refused.
ONE_VALUE = {"compile_cache_save_format": "unpacked", "compile_mm_encoder": True}


@pytest.mark.parametrize(
    ("model", "field"), [(model, field) for model in MODELS for field in model.model_fields]
)
def test_every_field_is_read_or_refused(model: type, field: str) -> None:
    reads = len(re.findall(rf"\.{field}\b", CODE)) + CODE.count(f'", "{field}")')
    assert field in ONE_VALUE or reads, f"nothing reads {model.__name__}.{field}"


@pytest.mark.parametrize("field", ONE_VALUE)
def test_a_value_without_effect_is_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=f"{field}: input should be"):
        CompilationConfig(**{field: ONE_VALUE[field]})


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * scale


def captured(**fields: object) -> piecework.StitchedModule:
    x, scale = torch.randn(3, 4), torch.ones(1)
    torch._dynamo.mark_dynamic(x, 0)
    made = piecework.compile(Linear(), (x, scale), config={"backend": "eager", **fields})
    made.capture([2, 4], progress=False, estimate=False)
    return made


def test_inputs_that_are_not_copied_lie_in_the_buffers() -> None:
    made = captured(cudagraph_copy_inputs=False)
    buffers = made.static_graphs.static_inputs(4)
    assert list(buffers) == ["x", "scale"]
    buffers["x"].normal_()
    buffers["scale"].fill_(3)
    kept = buffers["x"].clone()
    for rows in (4, 3):
        x = buffers["x"][:rows]
        torch.testing.assert_close(made(x, buffers["scale"]), made.model(x, buffers["scale"]))
    assert buffers["x"][:3].equal(kept[:3])
    assert not buffers["x"][3:].any()  # only the tail is filled
    assert {row.mode for row in made.call_report()} == {"PIECEWISE"}
    with pytest.raises(InputError, match="does not lie in its static buffer"):
        made(torch.randn(4, 4), buffers["scale"])
    with pytest.raises(InputError, match="scale"):
        made(buffers["x"], torch.ones(1))
    with pytest.raises(StaticGraphError, match="captured sizes: 2, 4"):
        made.static_graphs.static_inputs(5)
    assert made(torch.randn(5, 4), torch.ones(1)).shape == (5, 4)  # no graph serves it


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        ("bfloat16", "the program's dtype is bfloat16, and the model's weights are torch.float32"),
        ("float33", "the program's dtype is float33"),
    ],
)
def test_a_dtype_that_no_weight_has_is_refused(dtype: str, message: str) -> None:
    def compile_as(dtype: str) -> object:
        given = {"config": {"backend": "eager"}, "runtime_config": RuntimeConfig(dtype=dtype)}
        return piecework.compile(nn.Linear(4, 4), (torch.randn(3, 4),), **given)

    with piecework.counters.expect(num_graphs_seen=0), pytest.raises(ConfigError, match=message):
        compile_as(dtype)
    compile_as("float32")
    compile_as("")
