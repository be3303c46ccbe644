"""Nothing of the caller's lives on because a stitched model watches it: weak references over the kinds of places."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from models import EAGER
from torch import nn

import piecework
from piecework.errors import PieceworkError


class Thing:
    def __init__(self, **held: object) -> None:
        self.rate = 2.0
        vars(self).update(held)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)
        self.read, self.nested = Thing(), Thing(inner=Thing())
        self.listed, self.table = [Thing()], {"a": Thing()}
        self.act = lambda x: x * 2.0

    def forward(self, x):
        x = self.act(self.linear(x)) * self.read.rate * self.nested.inner.rate
        return x * self.listed[0].rate * self.table["a"].rate


@pytest.mark.parametrize(
    ("at", "drop"),
    [
        (lambda m: m.unused, lambda m: delattr(m, "unused")),
        (lambda m: m.unused.weight, lambda m: delattr(m, "unused")),
        (lambda m: m.read, lambda m: delattr(m, "read")),
        (lambda m: m.nested.inner, lambda m: delattr(m, "nested")),
        (lambda m: m.act, lambda m: delattr(m, "act")),
        (lambda m: m.linear, lambda m: setattr(m, "linear", nn.Linear(4, 4))),
    ],
)
def test_what_the_model_drops_is_gone_at_once(at, drop) -> None:
    model, x = Model().eval(), torch.randn(3, 4)
    stitched = piecework.compile(model, (x,), config=EAGER)
    stitched(x)
    gone = weakref.ref(at(model))
    drop(model)
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize(
    ("at", "drop"),
    [
        (lambda m: m.listed[0], lambda m: m.listed.clear()),
        (lambda m: m.table["a"], lambda m: m.table.clear()),
        (lambda m: m.table["a"], lambda m: delattr(m, "table")),
    ],
)
def test_what_lay_in_a_list_or_a_dictionary_is_gone_after_the_next_call(at, drop) -> None:
    model, x = Model().eval(), torch.randn(3, 4)
    stitched = piecework.compile(model, (x,), config=EAGER)
    stitched(x)
    gone = weakref.ref(at(model))
    drop(model)
    with pytest.raises(PieceworkError):
        stitched(x)
    gc.collect()
    assert gone() is None


def test_weights_that_were_replaced_go_with_a_rebind() -> None:
    model, x = Model().eval(), torch.randn(3, 4)
    stitched = piecework.compile(model, (x,), config=EAGER)
    stitched(x)
    gone = weakref.ref(model.linear.weight)
    model.linear = nn.Linear(4, 4)
    stitched.rebind()
    stitched(x)
    gc.collect()
    assert gone() is None
