"""Numbers and sizes in a model's result: those of each call, of the model's own types, and never the example's."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import piecework
from piecework.errors import InputError

Sizes = namedtuple("Sizes", "rows shape")


def compiled(function, *args, backend: str = "eager"):
    return piecework.compile(function, args, config=piecework.CompilationConfig(backend=backend))


def same(left, right) -> bool:
    if isinstance(left, torch.Tensor):
        return type(left) is type(right) and torch.equal(left, right)
    if isinstance(left, (list, tuple)):
        return type(left) is type(right) and len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict):
        return (
            type(left) is type(right)
            and list(left) == list(right)
            and all(same(left[key], right[key]) for key in left)
        )
    return type(left) is type(right) and left == right


FUNCTIONS = {
    "shape": lambda x: (x * 2, x.shape),
    "size": lambda x: (x * 2, x.size()),
    "one size": lambda x: (x * 2, x.size(0), x.shape[-1]),
    "rows": lambda x: (x * 2, len(x)),
    "part of a shape": lambda x: (x * 2, x.shape[:1], x.shape[1:]),
    "plain containers": lambda x: {"y": x * 2, "s": [x.shape, (x.shape[0], list(x.shape))]},
    "a shape of the result": lambda x: (y := x * 2, y.shape, y[1:].shape),
    "arithmetic": lambda x: (x * 2, x.shape[0] * 2 + 1, x.numel(), x.shape[0] // 2),
    "float": lambda x: (x * 2, x.shape[0] * 0.5, x.shape[0] / 3),
    "float and tensor": lambda x: (
        torch.tensor(2.0, dtype=torch.float64) * x.shape[0],
        x.shape[0] / 4,
        x * 2,
    ),
    "named tuple": lambda x: (x * 2, Sizes(x.shape[0], x.shape)),
    "ordered": lambda x: OrderedDict(y=x * 2, n=x.shape[0], s=x.shape),
    "twice": lambda x: (x * 2, x.shape[0], x.shape[0]),
    "fixed": lambda x: (x * 2, 3, 2.5, True, "text", torch.Size([2, 2])),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_sizes_in_results_are_those_of_the_call(name: str) -> None:
    function = FUNCTIONS[name]
    stitched = compiled(function, torch.randn(4, 3))
    for shape in ((7, 3), (4, 3), (2, 5), (1, 3), (4, 6)):
        x = torch.randn(shape)
        assert same(stitched(x), function(x)), (stitched(x), function(x))


def test_an_integer_argument_is_returned_as_it_was_passed() -> None:
    def function(x, k):
        return x * k, k, k + 1, [k]

    stitched = compiled(function, torch.randn(4, 3), 3)
    x = torch.randn(5, 3)
    for k in (3, 5, 12):
        assert same(stitched(x, k), function(x, k))


def test_an_integer_argument_that_the_trace_fixed_is_checked() -> None:
    def function(x, k):
        return x.reshape(-1, 3 if k == 3 else 1), k

    stitched = compiled(function, torch.randn(4, 3), 3)
    x = torch.randn(5, 3)
    assert same(stitched(x, 3), function(x, 3))
    with pytest.raises(InputError, match="k"):
        stitched(x, 5)


def test_a_class_of_results_keeps_its_numbers_current() -> None:
    transformers = pytest.importorskip("transformers.modeling_outputs")

    def function(x):
        return transformers.BaseModelOutput(last_hidden_state=x * 2, hidden_states=(x.shape[0],))

    stitched = compiled(function, torch.randn(4, 3))
    for rows in (7, 2):
        result = stitched(torch.ones(rows, 3))
        assert type(result) is transformers.BaseModelOutput
        assert result.hidden_states == (rows,)


def test_captured_batches_return_the_callers_sizes() -> None:
    linear = nn.Linear(3, 3).requires_grad_(False)

    def function(x):
        return linear(x), x.shape, x.shape[0] * 2

    x = torch.randn(4, 3)
    torch._dynamo.mark_dynamic(x, 0)
    stitched = compiled(function, x)
    stitched.capture([2, 4, 8], progress=False, estimate=False)
    for rows in (2, 3, 4, 7):
        y, shape, double = stitched(torch.ones(rows, 3))
        assert y.shape == (rows, 3)
        assert same(shape, torch.Size([rows, 3])) and double == 2 * rows


# --- texts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        lambda n: f"{n}",
        lambda n: str(n),
        lambda n: f"a{n}",
        lambda n: "{}".format(n),  # noqa: UP032
        lambda n: [f"{n}", 1, {"a": f"b{n}"}],
    ],
)
def test_text_of_an_integer_argument(text: Callable[[int], object]) -> None:
    def model(x: torch.Tensor, n: int) -> Any:
        return x * n, text(n)

    x = torch.randn(4, 8)
    stitched = piecework.compile(model, (x, 5), config={"backend": "eager"})
    assert stitched(x, 5)[1] == model(x, 5)[1]
    with pytest.raises(InputError, match="argument n has value 7"):
        stitched(x, 7)


@pytest.mark.parametrize("text", [lambda x: f"{x.shape[0]}", lambda x: f"{x.shape[0]} rows"])
def test_text_of_a_size(text: Callable[[torch.Tensor], str]) -> None:
    def model(x: torch.Tensor) -> Any:
        return x * 2, text(x)

    stitched = piecework.compile(model, (torch.randn(4, 8),), config={"backend": "eager"})
    for count in (4, 6):
        assert stitched(torch.randn(count, 8))[1] == text(torch.randn(count, 8))
