"""What torch's tools run otherwise than eager does: in, forwards that write to what an operator may have handed back, and constants that a text loses; out, what eager gives, memory included."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from models import EAGER

import piecework

# Traced with AOTAutograd, which makes of writes what a compiler gets to see, and run as it is.
TRACED_AGAIN = {"backend": "aot_eager", "mode": "DYNAMO_TRACE_ONCE"}
LAYER = torch.nn.Linear(6, 6).eval()
Step = Callable[[torch.Tensor], torch.Tensor]

HANDED_BACK: dict[str, Step] = {
    "dropout in evaluation": lambda x: F.dropout(x, 0.5, False),
    "dropout by keywords": lambda x: F.dropout(x, p=0.5, training=False, inplace=True),
    "dropout of nothing": lambda x: F.dropout(x, 0.0, True),
    "torch's own dropout": lambda x: torch.dropout(x, 0.5, False),
    "a dropout layer": torch.nn.Dropout(0.5).eval(),
    "two of them": lambda x: F.dropout(F.dropout(x, 0.1, False), 0.1, False),
    "alpha dropout": lambda x: F.alpha_dropout(x, 0.5, False),
}
IN_ORDER_WHERE_ONE: dict[str, Step] = {
    "some columns": lambda x: x[:, 1:3].contiguous(),
    "one column": lambda x: x[:, :1].contiguous(),
    "columns in a row": lambda x: x[:, :2].reshape(-1),
    "transposed, in a row": lambda x: x.T.reshape(-1),
    "transposed and flat": lambda x: x.T.ravel(),
    "flattened": lambda x: x[:, :2].flatten(),
    "another order": lambda x: x[:, None, :3].contiguous(memory_format=torch.contiguous_format),
}
STEPS = {**HANDED_BACK, **IN_ORDER_WHERE_ONE}


def written(step: Step) -> Callable[[torch.Tensor], object]:
    """Writes to what a step gives, and reads what it was given."""

    def forward(x: torch.Tensor) -> object:
        hidden = LAYER(x)
        step(hidden).add_(1)
        return hidden * 2

    return forward


def written_before(step: Step) -> Callable[[torch.Tensor], object]:
    """Writes to what a step was given, and reads what it gives."""

    def forward(x: torch.Tensor) -> object:
        hidden = LAYER(x)
        given = step(hidden)
        hidden.mul_(2)
        return given + 0

    return forward


def written_argument(step: Step) -> Callable[[torch.Tensor], object]:
    def forward(x: torch.Tensor) -> object:
        step(x).add_(1)
        return x * 2

    return forward


WAYS = {"result": written, "source": written_before, "argument": written_argument}


@pytest.mark.sample(4)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", STEPS)
def test_a_write_is_seen_wherever_eager_shows_it(name: str, way: str) -> None:
    model = WAYS[way](STEPS[name])
    stitched = piecework.compile(model, (torch.randn(4, 6),), config=TRACED_AGAIN)
    for count in (4, 3, 1, 2, 0):
        x = torch.randn(count, 6)
        mine, theirs = x.clone(), x.clone()
        with torch.no_grad():
            torch.testing.assert_close(stitched(mine), model(theirs), msg=f"{count} rows")
        torch.testing.assert_close(mine, theirs, msg=f"{count} rows")


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", IN_ORDER_WHERE_ONE)
def test_one_trace_serves_one_row_where_nothing_is_written(name: str) -> None:
    step = IN_ORDER_WHERE_ONE[name]
    stitched = piecework.compile(lambda x: step(LAYER(x)) * 2, (torch.randn(4, 6),), config=EAGER)
    kept = piecework.compile(written(step), (torch.randn(4, 6),), config=EAGER)
    for each in (stitched, kept):
        each(torch.randn(1, 6))
    assert len(kept.traces) == 2
    assert len(stitched.traces) <= len(kept.traces)


@pytest.mark.inductor
@pytest.mark.nightly
@pytest.mark.parametrize("name", STEPS)
def test_compiled_writes_are_seen_too(name: str) -> None:
    model = written(STEPS[name])
    stitched = piecework.compile(model, (torch.randn(4, 6),))
    for count in (4, 1):
        x = torch.randn(count, 6)
        with torch.no_grad():
            torch.testing.assert_close(stitched(x), model(x))


@pytest.mark.sample(3)
@pytest.mark.parametrize("way", HANDED_BACK)
def test_what_is_handed_back_is_the_argument(way: str) -> None:
    stitched = piecework.compile(HANDED_BACK[way], (torch.randn(4, 6),), config=TRACED_AGAIN)
    x = torch.randn(3, 6)
    assert stitched(x) is x


PARTS = (0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan)


@pytest.mark.sample(5)
@pytest.mark.parametrize("imaginary", PARTS)
@pytest.mark.parametrize("real", PARTS)
def test_complex_constants_are_themselves(real: float, imaginary: float) -> None:
    number = complex(real, imaginary)

    def model(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x * number, torch.full((2,), number), torch.complex(x, x) + number

    stitched = piecework.compile(model, (torch.randn(4),), config=EAGER)
    x = torch.tensor([0.0, -0.0, 2.0])
    for found, expected in zip(stitched(x), model(x), strict=True):
        assert repr(found) == repr(expected)
