"""Inference mode at compiling, capturing, rebinding and calling, in every combination; weights and examples that are inference tensors."""

from __future__ import annotations

import itertools

import pytest
import torch
from models import EAGER, halve
from torch import nn

import piecework


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        y = self.enter(x)
        out = torch.empty_like(y)
        halve(y, out)
        z = self.leave(out) + fixed
        again = torch.empty_like(z.mT)  # not contiguous, empty where the batch is
        halve(z.mT, again)
        return again.mT + y[:0].sum()


def arguments(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    fixed = torch.randn(6)
    torch._dynamo.mark_static(fixed, 0)
    x = torch.randn(batch, 6)
    torch._dynamo.decorators.mark_unbacked(x, 0)
    return x, fixed


def check(stitched: piecework.StitchedModule, model: Model, batch: int, calling: bool) -> None:
    for made in (True, False):
        with torch.inference_mode(made):
            x, fixed = torch.randn(batch, 6), torch.randn(6)
        with torch.inference_mode(calling):
            result = stitched(x, fixed)
            with torch.no_grad():  # inference_mode(False) turns gradients on
                torch.testing.assert_close(result, model(x, fixed))


@pytest.mark.parametrize("weights", [True, pytest.param(False, marks=pytest.mark.nightly)])
def test_every_combination(weights: bool) -> None:
    for example, compiling in ((False, True), (True, False)):
        with torch.inference_mode(weights):
            model = Model()
        with torch.inference_mode(example):
            args = arguments(4)
        with torch.inference_mode(compiling):
            stitched = piecework.compile(model, args, splitting_ops=[halve], config=EAGER)
        for mode, capturing, calling in itertools.product(
            ["PIECEWISE", "FULL"], [False, True], [False, True]
        ):
            with torch.inference_mode(capturing):
                stitched.capture([2, 4], mode=mode, progress=False, estimate=calling)
            for batch, now in itertools.product([2, 3, 5], [calling, not calling]):
                check(stitched, model, batch, now)
            assert {row.mode for row in stitched.call_report()} == {mode, "NONE"}
            with torch.inference_mode(not capturing):
                model.enter.weight = nn.Parameter(torch.randn(6, 6), requires_grad=False)
            with torch.inference_mode(calling):
                stitched.rebind()
            check(stitched, model, 3, not calling)


@pytest.mark.parametrize("policy", ["copy", "eager"])
@pytest.mark.parametrize("uses", [True, False])
def test_results_that_stay_where_they_are_are_plain_tensors(uses: bool, policy: str) -> None:
    """Static results that a caller keeps (``clone_outputs=False``) may be written in either mode."""
    model = Model()
    stitched = piecework.compile(model, arguments(4), splitting_ops=[halve], config=EAGER)
    with torch.inference_mode(uses):
        stitched.capture(
            [4], progress=False, estimate=False, clone_outputs=False, address_policy=policy
        )
    result = stitched(*arguments(4))
    assert isinstance(result, torch.Tensor) and not result.is_inference()
    result.zero_()
    check(stitched, model, 4, not uses)
