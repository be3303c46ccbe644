"""New values in the same weights: `StitchedModule.refit`, with static graphs and without."""

from __future__ import annotations

import pytest
import torch
from captured import calls
from models import EAGER

import piecework
from piecework.errors import BindError
from piecework.runtime.counters import counters


def build(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 8))
    model.register_buffer("unused", torch.randn(3))
    return model.eval()


def compiled(model: torch.nn.Module) -> piecework.StitchedModule:
    return piecework.compile(model, (torch.randn(4, 8),), config=EAGER)


@pytest.mark.parametrize("captured", [False, True])
def test_twenty_refits_serve_each_the_weights_of_now(captured: bool) -> None:
    stitched = compiled(build(0))
    if captured:
        stitched.capture([2, 4], progress=False)
    x = torch.randn(2, 8)
    with counters.expect(num_graphs_seen=0, num_cudagraph_captured=0), torch.no_grad():
        for seed in range(20):
            other = build(seed % 3)
            stitched.refit(other.state_dict())
            torch.testing.assert_close(stitched(x), other(x))
    if captured:
        assert calls(stitched, "mode") == {"PIECEWISE": 20}


@pytest.mark.parametrize(
    ("name", "new", "said"),
    [
        ("3.weight", torch.zeros(8, 8), "no such weight"),
        ("2.weight", torch.zeros(8, 9), r"\(8, 8\), the new one \(8, 9\)"),
        ("2.bias", torch.zeros(8, dtype=torch.float64), "float64"),
    ],
)
def test_what_does_not_fit_changes_nothing(name: str, new: torch.Tensor, said: str) -> None:
    stitched = compiled(build(0))
    state = build(1).state_dict()
    with pytest.raises(BindError, match=said) as caught:
        stitched.refit({**state, name: new})
    assert caught.value.where == name
    x = torch.randn(2, 8)
    with torch.no_grad():
        torch.testing.assert_close(stitched(x), build(0)(x))
