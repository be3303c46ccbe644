"""What padding reaches: a table of graphs, each with what is said of its result, and checked against running it padded."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

import piecework
from piecework.runtime.config import CompilationConfig
from piecework.runtime.padding import padding_changes

EAGER = CompilationConfig(backend="eager")
W = torch.randn(4, 4)


@piecework.splitting_op("padding_test::own")
def own(x: torch.Tensor, rows: int) -> torch.Tensor:
    return x * 2


@own.register_fake
def _(x: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.empty_like(x)


def region(x: torch.Tensor, body: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    with torch.autocast("cpu", enabled=False):
        return body(x)


def said(model: Callable[..., object], *args: torch.Tensor) -> tuple[str | None, ...]:
    for each in args:
        torch._dynamo.mark_dynamic(each, 0)
    stitched = piecework.compile(model, args, config=EAGER)
    backend = stitched.backend
    assert backend.graph is not None and backend.batch_symbol is not None
    return padding_changes(backend.graph, {backend.batch_symbol})


KEEP: dict[str, Callable[[torch.Tensor], object]] = {
    "rowwise": lambda x: torch.relu(x @ W) + 1,
    "sum of each row": lambda x: x.sum(-1, keepdim=True) + x,
    "transposed": lambda x: (x.t() * 2).t(),
    "softmax of each row": lambda x: F.softmax(x, -1) + torch.softmax(x, dim=1),
    "reshaped and back": lambda x: x.view(-1, 2, 2).transpose(1, 2).reshape(x.shape[0], 4),
    "positions": lambda x: x + torch.arange(x.shape[0])[:, None],
    "like": lambda x: x + torch.zeros_like(x) + x.new_zeros(4) + torch.ones(x.shape[0], 1),
    "split columns": lambda x: torch.cat(x.chunk(2, -1)[::-1], -1),
    "weights alone": lambda x: (x + W.sum(0) + W.mean()),
    "causal": lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None], is_causal=True),
    "pairs": lambda x: x @ x.t(),
    "in place": lambda x: (x * 1).add_(1).mul_(2),
    "own op": lambda x: own(x, x.shape[0]) + 1,
    "sorted columns": lambda x: x.sort(-1).values.flip(1),
    "running sum": lambda x: x.cumsum(0),
    "autocast region": lambda x: region(x, lambda y: y @ W + 1),
}
CHANGE: dict[str, tuple[Callable[[torch.Tensor], object], str]] = {
    "mean": (lambda x: x - x.mean(0), "mean .* takes all rows together"),
    "keepdim": (lambda x: x / x.sum(0, keepdim=True), "sum .* takes all rows together"),
    "max": (lambda x: x - x.amax(0), "amax .* takes all rows"),
    "last row": (lambda x: x + x[-1], "getitem .* takes all rows"),
    "size": (lambda x: x * x.shape[0], "mul .* uses the batch size as a number"),
    "size plus one": (lambda x: x / (x.shape[0] + 1), "truediv .* uses the batch size"),
    "full": (lambda x: x + torch.full((x.shape[0], 1), x.shape[0]), "full .* uses the batch size"),
    "softmax": (lambda x: F.softmax(x, 0), "softmax .* along the batch"),
    "softmax by keyword": (lambda x: torch.softmax(x, dim=-2), "softmax .* along the batch"),
    "flip": (lambda x: x.flip(0), "flip .* along the batch"),
    "roll": (lambda x: x.roll(1, 0), "roll .* along the batch"),
    "roll of all": (lambda x: x.roll(1), "roll .* along the batch"),
    "sort": (lambda x: x.sort(0).values, "sort .* along the batch"),
    "attention": (lambda x: torch.softmax(x @ x.t(), -1) @ x, "softmax .* along the batch"),
    "product": (lambda x: (x @ x.t()) @ x, "product over the batch"),
    "sdpa": (
        lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None]),
        "attends over the batch",
    ),
    "dealt anew": (lambda x: x.view(4, x.shape[0]).t(), "deals rows out anew"),
    "from the end": (lambda x: x + torch.arange(x.shape[0] - 1, -1, -1)[:, None], "arange"),
    "in place": (lambda x: (x * 1).sub_(x.mean()), "mean .* takes all rows"),
    "through memory": (
        lambda x: torch.empty_like(x).copy_(x.mean(0)) + 1,
        "mean .* takes all rows",
    ),
    "mean in an autocast region": (
        lambda x: region(x, lambda y: y - y.mean(0)),
        "mean .* takes all rows",
    ),
    "sum of positions": (lambda x: x + torch.arange(x.shape[0]).sum(), "sum .* takes all rows"),
}


@pytest.mark.parametrize("name", KEEP)
def test_rows_that_padding_does_not_reach(name: str) -> None:
    model = KEEP[name]
    assert said(model, torch.randn(5, 4)) == (None,)
    # and so it is: a padded run has the same first rows
    x = torch.randn(3, 4)
    padded, alone = model(torch.cat([x, torch.full((4, 4), 9.0)])), model(x)
    for dim in range(alone.dim()):  # type: ignore[attr-defined]
        padded = padded.narrow(dim, 0, alone.shape[dim])  # type: ignore[attr-defined]
    torch.testing.assert_close(padded, alone)


@pytest.mark.parametrize("name", CHANGE)
def test_rows_that_padding_changes(name: str) -> None:
    model, why = CHANGE[name]
    [reason] = said(model, torch.randn(5, 4))
    assert reason is not None
    assert re.search(why, reason), reason
    assert "test_padding.py" in reason
    # and so it is: a padded run has other first rows
    x = torch.randn(3, 4)
    tail = torch.tensor([[9.0], [-9.0]]).expand(2, 4)
    padded, alone = model(torch.cat([x, tail])), model(x)
    assert not torch.equal(padded[..., :3, :], alone)  # type: ignore[index]


def test_each_result_is_told_by_itself() -> None:
    def model(x, y):
        y = x + y
        return x + 1, y.sum(), x * 2, (y * 2).mean(0)

    reasons = said(model, torch.randn(5, 4), torch.randn(5, 4))
    assert [reason is None for reason in reasons] == [True, False, True, False]


def test_what_a_higher_order_operator_runs_is_looked_into() -> None:
    def model(x, flag):
        y = torch.cond(flag, lambda z: z - z.mean(0), lambda z: z + 1, (x,))
        return y * 2, torch.cond(flag, lambda z: z * 2, lambda z: z + 1, (x,))

    x, flag = torch.randn(5, 4), torch.tensor(True)
    torch._dynamo.mark_dynamic(x, 0)
    backend = piecework.compile(model, (x, flag), config=EAGER).backend
    mixed, kept = padding_changes(backend.graph, {backend.batch_symbol})
    assert mixed is not None and "mean" in mixed and kept is None


def test_writes_reach_every_view_of_the_memory() -> None:
    def model(x):
        base = x * 1
        row = base[:, 0]
        row.sub_(x.mean())
        return base, x + 1

    reasons = said(model, torch.randn(5, 4))
    assert reasons[0] is not None and reasons[1] is None
