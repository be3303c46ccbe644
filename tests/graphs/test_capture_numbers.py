"""Sizes that one piece computes and another uses: fixed per captured size, proved to follow from it, refused where data decides."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from models import EAGER, halve

import piecework
from piecework.errors import StaticGraphError

Number = int | float


@piecework.splitting_op("numbers::scale")
def scale(x: torch.Tensor, by: int) -> torch.Tensor:
    return x * by


@scale.register_fake
def _(x: torch.Tensor, by: int) -> torch.Tensor:
    return torch.empty_like(x)


@piecework.splitting_op("numbers::count")
def count(x: torch.Tensor) -> int:
    return int((x > 0).sum())


@count.register_fake
def _(x: torch.Tensor) -> int:
    return torch.library.get_ctx().new_dynamic_size()


def halved(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    halve(x, out)
    return out


EXPRESSIONS: dict[str, Callable[[torch.Tensor, torch.Tensor], Number]] = {
    "difference": lambda x, y: x.shape[1] - 100,
    "floor": lambda x, y: (x.shape[1] * 7) // (y.shape[1] + 1),
    "smaller": lambda x, y: torch.sym_min(x.shape[1] * 2, y.shape[1] + 4),
    "joined": lambda x, y: torch.cat([x[0], y[0]]).shape[0] * 2,
    "root": lambda x, y: 1 / torch.sym_sqrt(y.shape[1] + 1),
    "batch": lambda x, y: x.shape[0] * 2 - x.shape[1],
}


def compiled(
    forward: Callable[..., object], *args: torch.Tensor, dims: tuple[int, ...] = (0, 1)
) -> piecework.StitchedModule:
    for arg in args:
        for dim in dims[: arg.dim()]:
            torch._dynamo.mark_dynamic(arg, dim)
    return piecework.compile(forward, args, config=EAGER)


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", EXPRESSIONS)
def test_an_expression_of_sizes_crosses_pieces(name: str) -> None:
    of = EXPRESSIONS[name]

    def forward(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        z = halved(x + 1)
        number = of(x, y)
        z = halved(z * 2 + number)  # the number is made in this piece,
        return (
            scale(halved(z * 3), 2) + number + y.sum(1, keepdim=True) * number
        )  # used in later ones

    stitched = compiled(forward, torch.randn(4, 6), torch.randn(4, 9))
    for mode, wide, long in (("PIECEWISE", 6, 9), ("FULL", 5, 7)):
        others = {"x.1": wide, "y.1": long}
        stitched.capture([2, 4], mode=mode, other_sizes=others, progress=False, estimate=False)
        for batch in (4, 2):
            x, y = torch.randn(batch, wide), torch.randn(batch, long)
            torch.testing.assert_close(stitched(x, y), forward(x, y))
        assert {row.mode for row in stitched.call_report()} == {mode}


def test_numbers_stand_in_the_replay_source_and_go_to_operators() -> None:
    def forward(x: torch.Tensor) -> tuple[torch.Tensor, int]:
        number = halved(x).shape[1] * 7
        return scale(x * 2, number) + 1, number

    stitched = compiled(forward, torch.randn(4, 6))
    stitched.capture([4], other_sizes={"x.1": 6}, progress=False, estimate=False)
    text = stitched.static_graphs.source_for(4).code
    assert "\nmul = 42\n" in text and ", mul)\n" in text
    x = torch.randn(4, 6)
    result, number = stitched(x)
    assert number == 42 and type(number) is int
    torch.testing.assert_close(result, forward(x)[0])


def used_in_another_piece(x: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
    number = (n * 2).item()
    return halved(halved(x) * 2) + number


FROM_DATA: list[Callable[..., object]] = [
    lambda x, n: halved(x) * 2 + n.item(),
    used_in_another_piece,
    lambda x, n: x * 2 + count(x) + n,
]


@pytest.mark.parametrize("mode", ["PIECEWISE", "FULL"])
@pytest.mark.parametrize("forward", FROM_DATA)
def test_numbers_that_are_read_from_data_or_made_by_an_operator_are_refused(
    forward: Callable[..., object], mode: str
) -> None:
    with torch._dynamo.config.patch(
        capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True
    ):
        stitched = compiled(forward, torch.randn(4, 6), torch.tensor(3), dims=(0,))
    with pytest.raises(StaticGraphError, match="read from data or made by an operator"):
        stitched.capture([4], mode=mode, progress=False, estimate=False)
    for value in (3, 5):
        x, n = torch.randn(4, 6), torch.tensor(value)
        torch.testing.assert_close(stitched(x, n), forward(x, n))
