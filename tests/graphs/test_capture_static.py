"""Arguments that the caller keeps in one place: graphs read and write them there, and nothing is copied."""

from __future__ import annotations

import pytest
import torch
from models import EAGER
from torch import nn

import piecework
from piecework.errors import BindError, InputError


@piecework.splitting_op("static_inputs::remember", mutates_args=("cache", "out"))
def remember(x: torch.Tensor, cache: torch.Tensor, out: torch.Tensor) -> None:
    cache[0].add_(x.sum(0))
    torch.add(x, cache.sum(0), out=out)


class Cached(nn.Module):
    """Writes to its cache in an operator, and in a captured piece."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
        x = self.enter(x)
        out = torch.empty_like(x)
        remember(x, cache, out)
        cache[1].mul_(2)
        return out + cache[1]


@pytest.fixture
def captured():
    model = Cached()
    x = torch.randn(8, 4)
    torch._dynamo.decorators.mark_unbacked(x, 0)
    stitched = piecework.compile(model, (x, torch.ones(3, 4)), config=EAGER)
    cache = torch.rand(3, 4)
    before = cache.clone()
    stitched.capture([2, 4], static={"cache": cache}, progress=False)
    assert torch.equal(cache, before), "runs on dummy inputs leave nothing behind"
    return model, stitched, cache


@torch.no_grad()
def test_it_is_read_and_written_in_place_and_never_copied(captured):
    model, stitched, cache = captured
    expected = cache.clone()
    for size in (2, 4, 2, 3):
        x = torch.randn(size, 4)
        torch.testing.assert_close(stitched(x, cache), model(x, expected))
        torch.testing.assert_close(cache, expected)
    assert stitched.static_graphs.static_inputs(2)["cache"].data_ptr() == cache.data_ptr()
    with torch.profiler.profile() as profile:
        stitched(torch.randn(2, 4), cache)
    copies = sum(e.count for e in profile.key_averages() if e.key == "aten::copy_")
    model_copies = _copies_without(stitched, 2)
    assert copies < model_copies, "the same call with a cache of our own copies it in and out"


def _copies_without(stitched: piecework.StitchedModule, size: int) -> int:
    stitched.capture([2, 4], progress=False)
    cache = torch.rand(3, 4)
    with torch.profiler.profile() as profile:
        stitched(torch.randn(size, 4), cache)
    return sum(e.count for e in profile.key_averages() if e.key == "aten::copy_")


@torch.no_grad()
def test_another_tensor_is_an_error_and_nothing_is_written(captured):
    _, stitched, cache = captured
    other, before = cache.clone(), cache.clone()
    with pytest.raises(InputError, match=r"static buffer.*capture\(static="):
        stitched(torch.randn(2, 4), other)
    assert torch.equal(other, before) and torch.equal(cache, before)


@pytest.mark.parametrize(
    ("static", "message"),
    [
        ({"cash": torch.ones(3, 4)}, "no argument 'cash'"),
        ({"x": torch.ones(2, 4)}, "no argument 'x'"),
        ({"cache": torch.ones(3, 4, dtype=torch.float64)}, "cache is torch.float64"),
        ({"cache": torch.ones(4, 3).t()}, "strides"),
        ({"cache": torch.ones(2, 4)}, r"was traced as torch.float32 \[3, 4\]"),
    ],
)
def test_what_does_not_fit_is_refused(captured, static, message):
    _, stitched, _ = captured
    with pytest.raises(BindError, match=message):
        stitched.capture([2], static=static, progress=False)
