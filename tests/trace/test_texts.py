"""Results that are text made of a number: a text, and the text of each call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import piecework
from piecework.errors import InputError

EAGER = {"backend": "eager"}


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
    stitched = piecework.compile(model, (x, 5), config=EAGER)
    assert stitched(x, 5)[1] == model(x, 5)[1]
    with pytest.raises(InputError, match="argument n was 5"):
        stitched(x, 7)


@pytest.mark.parametrize("text", [lambda x: f"{x.shape[0]}", lambda x: f"{x.shape[0]} rows"])
def test_text_of_a_size(text: Callable[[torch.Tensor], str]) -> None:
    def model(x: torch.Tensor) -> Any:
        return x * 2, text(x)

    stitched = piecework.compile(model, (torch.randn(4, 8),), config=EAGER)
    for count in (4, 6):
        assert stitched(torch.randn(count, 8))[1] == text(torch.randn(count, 8))
