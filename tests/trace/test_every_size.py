"""Which models one trace serves at every size, 0 and 1 included: whatever is decided, results are eager's at 5, 2, 1 and 0 rows."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import piecework
from piecework.runtime.compilers.interface import CompiledPiece, EagerAdaptor

LAYER = nn.MultiheadAttention(8, 2).eval()
Make = Callable[[int], torch.Tensor]


def rows(*shape: int) -> Make:
    return lambda count: torch.randn(count, *shape)


class Heads(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = x.view(-1, 3, 2, 4).transpose(1, 2)
        return (torch.softmax(q @ q.transpose(-1, -2), -1) @ q).transpose(1, 2).reshape(-1, 3, 8)


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.up = nn.Embedding(10, 8), nn.Linear(8, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.up(self.table(ids))


class Counts(nn.Module):
    """Writes to a buffer of its own, which a try must leave alone."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        return x + self.calls * 0


def column_set(x: torch.Tensor) -> torch.Tensor:
    y = x * 1
    y[:, 0] = 0
    return y


ONE: dict[str, tuple[Callable[..., Any], Make]] = {
    "linear": (nn.Linear(8, 4), rows(8)),
    "feed forward": (
        nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)),
        rows(3, 8),
    ),
    "heads": (Heads(), rows(3, 8)),
    "parts": (lambda x: [y * 2 for y in x.split([2, 6], -1)] + [x.unbind(1)[0]], rows(8)),
    "reduced": (lambda x: (x.sum(-1), x.argmax(-1), x.max(-1)), rows(8)),
    "in place": (column_set, rows(8)),
    "embedded": (Embedded(), lambda count: torch.arange(count) % 10),
    "attention layer": (lambda x: LAYER(x, x, x)[0], rows(3, 8)),
    "a mean of rows": (lambda x: x - x.mean(0), rows(8)),
    "a part of the rows": (lambda x: x[1:], rows(8)),
    "the size": (lambda x: x / x.shape[0], rows(8)),
    "counts": (Counts(), rows(8)),
}
SEVERAL: dict[str, tuple[Callable[..., Any], Make]] = {
    "a copy that is none for one row": (lambda x: x.t().contiguous() * 1, rows(8)),
    "the largest row": (lambda x: x.max(0).values, rows(8)),
    "convolution": (nn.Conv1d(3, 4, 3), rows(3, 8)),
    "dimensions that happen to be one": (lambda x: x[:, :1].squeeze() * 2, rows(8)),
    "two dimensions": (lambda x: x @ x.t(), rows(8)),
}


@pytest.mark.parametrize("name", [*ONE, *SEVERAL])
def test_every_size_is_eagers(name: str) -> None:
    model, make = {**ONE, **SEVERAL}[name]
    stitched = piecework.compile(model, (make(6),), config={"backend": "eager"})
    lowest = [each.low for each in stitched.traces[0].entry.plan().symbols]
    assert (lowest[0] == 0) is (name in ONE)
    for count in (5, 2, 1, 0):
        x = make(count)
        try:
            expected = model(x.clone())
        except IndexError:  # no largest of no rows
            with pytest.raises(Exception, match=r"non-zero size|zero-size"):
                stitched(x)
            continue
        found = stitched(x.clone())
        for one, two in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
            torch.testing.assert_close(one, two, equal_nan=True)


def test_a_try_changes_nothing() -> None:
    model = Counts()
    x = torch.randn(4, 8)
    before, drawn = torch.get_rng_state(), random.getstate()
    piecework.compile(model, (x,), config={"backend": "eager"})
    assert model.calls.sum() == 0
    assert random.getstate() == drawn
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.inductor
def test_what_inductor_compiles_is_tried() -> None:
    for name in ("heads", "a copy that is none for one row"):
        model, make = {**ONE, **SEVERAL}[name]
        stitched = piecework.compile(model, (make(6),))
        for count in (5, 1, 0):
            x = make(count)
            torch.testing.assert_close(stitched(x), model(x), rtol=1e-4, atol=1e-4)


def test_a_compiler_that_is_wrong_for_one_row_is_found_out() -> None:
    model = nn.Linear(8, 4)
    config = {"backend": f"{__name__}.WrongForOne"}
    stitched = piecework.compile(model, (torch.randn(6, 8),), config=config)
    assert next(iter(stitched.traces[0].entry.plan().symbols)).low == 2


class WrongForOne(EagerAdaptor):
    """Compiles nothing, and forgets an only row."""

    name = "wrong"

    def compile(self, graph, example_inputs, config, compile_range):  # type: ignore[no-untyped-def]
        made = super().compile(graph, example_inputs, config, compile_range)

        def run(*args: object) -> object:
            (found,) = made.runnable(*args)
            return (found * 0 if found.shape[0] == 1 else found,)

        return CompiledPiece(run)


@piecework.splitting_op("every_size::mix", mutates_args=("out",))
def mix(x: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(x)


def test_a_piece_that_makes_room_for_a_splitting_op() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        y, out = x * 2, torch.empty_like(x)
        mix(y, out)
        return out + 1

    stitched = piecework.compile(model, (torch.randn(6, 8),), config={"backend": "eager"})
    for count in (3, 1, 0):
        x = torch.randn(count, 8)
        torch.testing.assert_close(stitched(x), x * 2 + 1)
    assert len(stitched.traces) == 1


# --- copies that are none for one row --------------------------------------------------------------------

Step = Callable[[torch.Tensor], torch.Tensor]
UP = nn.Linear(6, 6).eval()
# Traced with AOTAutograd, which makes of writes what a compiler gets to see, and run as it is.
TRACED_AGAIN = {"backend": "aot_eager", "mode": "DYNAMO_TRACE_ONCE"}
IN_ORDER_WHERE_ONE: dict[str, Step] = {
    "some columns": lambda x: x[:, 1:3].contiguous(),
    "columns in a row": lambda x: x[:, :2].reshape(-1),
    "transposed, in a row": lambda x: x.T.reshape(-1),
    "another order": lambda x: x[:, None, :3].contiguous(memory_format=torch.contiguous_format),
}


def written(step: Step) -> Callable[[torch.Tensor], object]:
    """Writes to what a step gives, and reads what it was given."""

    def forward(x: torch.Tensor) -> object:
        hidden = UP(x)
        step(hidden).add_(1)
        return hidden * 2

    return forward


def written_before(step: Step) -> Callable[[torch.Tensor], object]:
    """Writes to what a step was given, and reads what it gives."""

    def forward(x: torch.Tensor) -> object:
        hidden = UP(x)
        given = step(hidden)
        hidden.mul_(2)
        return given + 0

    return forward


WAYS = {"result": written, "source": written_before}


@pytest.mark.sample(4)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", IN_ORDER_WHERE_ONE)
def test_a_write_is_seen_wherever_eager_shows_it(name: str, way: str) -> None:
    model = WAYS[way](IN_ORDER_WHERE_ONE[name])
    stitched = piecework.compile(model, (torch.randn(4, 6),), config=TRACED_AGAIN)
    for count in (4, 3, 1, 2, 0):
        x = torch.randn(count, 6)
        mine, theirs = x.clone(), x.clone()
        with torch.no_grad():
            torch.testing.assert_close(stitched(mine), model(theirs), msg=f"{count} rows")
        torch.testing.assert_close(mine, theirs, msg=f"{count} rows")
