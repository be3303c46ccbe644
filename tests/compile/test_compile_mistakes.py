"""Easy mistakes with ``piecework.compile`` and its neighbours: each is a typed error that says what was wanted and what came."""

from __future__ import annotations

import math
import runpy

import pytest
import torch
from models import EAGER
from torch import nn

import piecework
from piecework.errors import CaptureError, InputError

X = torch.randn(4, 8)


def compiled(function, *args, **options):
    return piecework.compile(function, args, config=EAGER, **options)


# --- errors of the model's own ---------------------------------------------------------------------


def raises(x):
    raise ValueError("my own text")


def misses_key(x):
    return x + {}["key"]


def misses_attribute(x):
    return x.colour


def adds_ranks(x):
    return torch.cat([x, x[0]])


def multiplies(x):
    return x @ torch.ones(9, 9)


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (raises, "ValueError: my own text"),
        (misses_key, "KeyError: key"),
        (misses_attribute, "AttributeError: 'Tensor' object has no attribute 'colour'"),
        (adds_ranks, "RuntimeError: Number of dimensions of tensors must match"),
        (multiplies, "RuntimeError: a and b must have same reduction dim"),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_an_error_of_the_models_own_keeps_its_words_and_line(function, text: str) -> None:
    with pytest.raises(CaptureError) as raised:
        compiled(function, X)
    assert raised.value.message.startswith(f"the model's own forward raises {text}")
    line = function.__code__.co_firstlineno + 1
    assert raised.value.where == f"test_compile_mistakes.py:{line} in {function.__name__}"


def test_an_assertion_of_the_models_own_is_shown(tmp_path) -> None:
    path = tmp_path / "asserting.py"  # pytest rewrites the assertions in this file
    path.write_text("def forward(x):\n    assert x.dim() == 3, 'three wanted'\n    return x + 1\n")
    forward = runpy.run_path(str(path))["forward"]
    with pytest.raises(
        CaptureError, match=r"AssertionError at assert x\.dim\(\) == 3, 'three wanted'"
    ):
        compiled(forward, X)


def calls_a_module(x):
    return nn.Linear(9, 9)(x)


def test_the_users_line_is_named_rather_than_torchs() -> None:
    with pytest.raises(CaptureError, match=r"test_compile_mistakes\.py:\d+ in calls_a_module"):
        compiled(calls_a_module, X)


# --- values that the trace fixed -------------------------------------------------------------------


def test_equal_floats_are_no_change_and_the_two_zeros_are() -> None:
    def function(x, scale):
        return x * scale

    assert compiled(function, X, math.nan)(X, float("nan")).isnan().all()
    assert compiled(function, X, 0.5)(X, 0.5).equal(X * 0.5)
    for traced, passed in ((0.0, -0.0), (-0.0, 0.0), (math.nan, 1.0), (1.0, math.nan)):
        with pytest.raises(InputError, match=f"value {passed!r}; .* with {traced!r}"):
            compiled(function, X, traced)(X, passed)


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * math.log(x.shape[0] + 1),
        lambda x: x + torch.linspace(0, 1, x.shape[0]).unsqueeze(1),
    ],
    ids=["log", "linspace"],
)
def test_a_batch_that_the_model_fixes_is_said_with_a_hint_that_helps(function) -> None:
    stitched = compiled(function, torch.randn(4, 8))
    x = torch.randn(4, 8)
    torch.testing.assert_close(stitched(x), function(x))
    with pytest.raises(InputError, match=r"traced with 4.*the code fixes the size.*mark_dynamic"):
        stitched.entry(torch.randn(5, 8))
    for rows in range(5, 12):  # a trace each, up to the limit
        x = torch.randn(rows, 8)
        torch.testing.assert_close(stitched(x), function(x))
    with pytest.raises(InputError, match="traced with 4"):
        stitched(torch.randn(12, 8))
    example = torch.randn(4, 8)
    torch._dynamo.mark_dynamic(example, 0)
    with pytest.raises(CaptureError, match=r"specialized|constant|marked"):
        compiled(function, example)
