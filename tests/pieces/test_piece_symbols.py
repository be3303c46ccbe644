"""Every size that a piece's code checks is one that the piece is given."""

from __future__ import annotations

from collections.abc import Callable

import models
import pytest
import torch

import piecework
from piecework import CompilationConfig

View = Callable[[torch.Tensor], torch.Tensor]

VIEWS: dict[str, View] = {
    "view": lambda out: out.view(-1, 2, 4),
    "reshape": lambda out: out.reshape(-1, 2, 2, 2),
    "unflatten": lambda out: out.unflatten(-1, (2, -1)),
    "flat": lambda out: out.view(-1),
    "part": lambda out: out[: out.shape[0] // 2],
}


class WrittenThroughItsBase(torch.nn.Module):
    """The piece after the operator takes a view, of a size that the trace then fixed."""

    def __init__(self, view: View) -> None:
        super().__init__()
        self.linear, self.view = torch.nn.Linear(8, 8), view

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        viewed = self.view(out)
        models.mix(self.linear(x), out)
        return viewed * 1


@pytest.mark.parametrize(
    ("form", "shape"), [*((form, (4, 8)) for form in VIEWS), ("view", (3, 5, 8))]
)
def test_a_size_that_the_trace_fixed_is_no_symbol_of_a_later_piece(
    form: str, shape: tuple[int, ...]
) -> None:
    model = WrittenThroughItsBase(VIEWS[form]).eval()
    config = CompilationConfig(splitting_ops=["models::mix"], backend="inductor")
    with torch.no_grad():
        stitched = piecework.compile(model, (torch.randn(shape),), config=config)
        for rows in (shape[0], 8):
            x = torch.randn(rows, *shape[1:])
            torch.testing.assert_close(stitched(x), model(x))
