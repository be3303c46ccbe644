"""Stitched modules among others: nothing of theirs outlives them, and Dynamo leaves their calls alone."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from models import EAGER, fresh
from torch import nn

import piecework
from piecework.errors import CaptureError


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return fresh(self.enter(x)) + 1


def compiled(model=None):
    return piecework.compile(
        Model() if model is None else model, (torch.randn(4, 8),), config=EAGER
    )


# --- lifetimes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("captured", [False, True])
def test_model_weights_and_example_die_with_the_stitched_module(captured: bool) -> None:
    model, example = Model().requires_grad_(False), torch.randn(4, 8)
    stitched = piecework.compile(model, (example,), config=EAGER)
    if captured:
        stitched.capture([2, 4], progress=False, estimate=False)
    stitched(torch.randn(3, 8))
    watched = {
        "model": weakref.ref(model),
        "weight": weakref.ref(model.enter.weight),
        "example": weakref.ref(example),
        "stitched": weakref.ref(stitched),
        "entry": weakref.ref(stitched.entry),
        "graph": weakref.ref(stitched.split_gm),
    }
    del model, example, stitched
    gc.collect()
    assert {name for name, each in watched.items() if each() is not None} == set()


def test_a_refused_model_dies_too() -> None:
    model = Model()
    model.forward = lambda x: x if x.sum() > 0 else -x
    watched = weakref.ref(model.enter.weight)
    with pytest.raises(CaptureError):
        compiled(model)
    del model
    gc.collect()
    assert watched() is None


# --- other tracers ---------------------------------------------------------------------------------


class Outer(nn.Module):
    def __init__(self, inner) -> None:
        super().__init__()
        self.inner, self.leave = inner, nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.leave(self.inner(self.leave(x)))


@pytest.mark.parametrize("how", ["called", "entry", "not compiled yet"])
def test_dynamo_leaves_a_stitched_call_alone(how: str) -> None:
    lazy = how == "not compiled yet"
    stitched = piecework.compile(Model(), config=EAGER) if lazy else compiled()
    call = stitched.entry if how == "entry" else stitched
    outer = Outer(call)
    through = torch.compile(outer, backend="eager")
    for rows in (4, 6, 2):
        x = torch.randn(rows, 8)
        torch.testing.assert_close(through(x), outer(x))


def test_a_full_graph_with_a_stitched_call_is_refused_with_the_reason() -> None:
    outer = Outer(compiled())
    torch._dynamo.reset()  # what it made of this forward with graph breaks would serve this call
    with pytest.raises(torch._dynamo.exc.Unsupported, match="calls a stitched module"):
        torch.compile(outer, backend="eager", fullgraph=True)(torch.randn(4, 8))
    with pytest.raises(CaptureError, match=r"calls a stitched module.*in forward"):
        compiled(outer)
