"""How arguments lie in memory: each call equals eager, whatever the layout of its arguments."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable

import pytest
import torch
from models import EAGER

import piecework
from piecework.errors import InputError, StaticGraphError

LAYOUTS: dict[str, Callable[[int], torch.Tensor]] = {
    "dense": lambda n: torch.randn(n, 6),
    "every second column": lambda n: torch.randn(n, 12)[:, ::2],
    "every third column": lambda n: torch.randn(n, 18)[:, ::3],
    "every second row": lambda n: torch.randn(2 * n, 6)[::2],
    "inside a larger tensor": lambda n: torch.randn(n + 3, 6)[3:],
    "inside, farther": lambda n: torch.randn(n + 5, 6)[5:],
    "columns inside": lambda n: torch.randn(n, 9)[:, 3:],
    "transposed": lambda n: torch.randn(6, n).t(),
    "expanded": lambda n: torch.randn(1, 6).expand(n, 6),
}


def branching(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Takes another way by layout, and returns a view."""
    y = x + 1 if x.is_contiguous() else x - 1
    return y * x.stride(1), x[:, 1:], y.contiguous()


@pytest.mark.sample(3)
@pytest.mark.parametrize("example", LAYOUTS)
def test_call_with_any_layout_after_any_example(example: str) -> None:
    stitched = piecework.compile(branching, (LAYOUTS[example](4),), config=EAGER)
    for layout, batch in itertools.product((example, *LAYOUTS), (4, 3)):
        x = LAYOUTS[layout](batch)
        for got, expected in zip(stitched(x), branching(x), strict=True):
            torch.testing.assert_close(got, expected)
            assert got.stride() == expected.stride(), layout


def test_strided_example_is_not_captured() -> None:
    x = LAYOUTS["columns inside"](4)
    torch._dynamo.mark_dynamic(x, 0)
    stitched = piecework.compile(lambda x: x * 2, (x,), config=EAGER)
    with pytest.raises(StaticGraphError, match="dense"):
        stitched.capture([2, 4], progress=False, estimate=False)


@pytest.mark.parametrize(
    "model",
    [lambda x: x * x.stride(0), lambda x: x * 2 if x.stride(0) > x.stride(1) else x * 3],
    ids=["stride", "order"],
)
@pytest.mark.parametrize("example", ["rows", "columns"])
def test_code_that_asks_for_strides_is_told_those_of_the_call(
    model: Callable[[torch.Tensor], torch.Tensor], example: str
) -> None:
    lying = {"rows": lambda n: torch.randn(n, 8), "columns": lambda n: torch.randn(8, n).t()}
    stitched = piecework.compile(model, (lying[example](3),), config={"backend": "eager"})
    answered = 0
    for rows, way in itertools.product((3, 1, 2, 5), lying):
        x = lying[way](rows)
        with contextlib.suppress(InputError):
            assert torch.equal(stitched(x), model(x))
            answered += way == example
    assert answered == 4
