"""Sizes that always equal the batch size, which a trace does not see. In: an argument that is indexed by row numbers. Out: captured once that is said, an error before."""

from __future__ import annotations

import pytest
import torch
from models import EAGER

import piecework


def masked(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """As transformers makes masks: the rows of ``mask`` are looked up by number, so nothing says how many there are."""
    rows = torch.arange(x.shape[0])
    return torch.sin(x) * mask[rows]


def stitched(sizes: str = "backed") -> piecework.StitchedModule:
    """A backed trace gives each dimension a size of its own; one for every size takes equal ones as one."""
    config = EAGER.replace(dynamic_shapes_config={"type": sizes})
    return piecework.compile(masked, (torch.randn(4, 8), torch.ones(4, 8)), config=config)


@torch.no_grad()
def test_a_size_that_only_equals_the_examples_batch_is_taken_for_it() -> None:
    """A call in which it doesn't runs uncaptured."""
    made = stitched().capture([2, 4], progress=False)
    for rows, longer in ((3, 3), (2, 2), (2, 3)):
        x, mask = torch.randn(rows, 8), torch.randn(longer, 8)
        torch.testing.assert_close(made(x, mask), masked(x, mask))
    assert sorted((row.mode, row.calls) for row in made.call_report()) == [
        ("NONE", 1),
        ("PIECEWISE", 1),
        ("PIECEWISE", 1),
    ]


@pytest.mark.parametrize("said", [{}, {"mask.0": "batch"}])
@pytest.mark.parametrize(("sizes", "served"), [([1, 2, 4], 4), ([2, 4], 4), ([1], 1)])
@torch.no_grad()
def test_one_that_equals_the_batch_is_captured_for_each_batch(
    sizes: list[int], served: int, said: dict[str, str]
) -> None:
    """Longer masks get a trace of their own in between, which could serve the captured sizes too, uncaptured."""
    made = stitched("auto").capture(sizes, other_sizes=said, progress=False)
    for rows in (1, 2, 3, 4):
        x, mask = torch.randn(rows, 8), torch.randn(rows, 8)
        torch.testing.assert_close(made(x, mask), masked(x, mask))
        longer = torch.randn(rows + 2, 8)
        torch.testing.assert_close(made(x, longer), masked(x, longer))
    rows = made.call_report()
    # One and three are padded to two and four: each row looks up its own.
    assert sum(row.calls for row in rows if row.mode == "PIECEWISE") == served
