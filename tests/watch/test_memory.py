"""Nothing of the caller's lives on because a stitched model watches it: weak references over the kinds of places."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from models import EAGER
from torch import nn

import piecework
from piecework.errors import PieceworkError

SCALE = [2.0]


class Thing:
    def __init__(self, **held: object) -> None:
        self.rate = 2.0
        vars(self).update(held)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.listing = nn.ParameterList([nn.Parameter(torch.ones(4))])
        self.layers = nn.ModuleList([nn.Linear(4, 4)])
        self.register_buffer("shift", torch.ones(4))
        self.plain = torch.ones(4)
        self.read, self.nested = Thing(), Thing(inner=Thing())
        self.listed, self.table = [Thing()], {"a": Thing()}
        self.pair = (Thing(), Thing())
        held = Thing()
        self.act = lambda x: x * held.rate
        self.linear.register_forward_hook(Hook())

    def forward(self, x):
        x = self.layers[0](self.act(self.linear(x)) * self.read.rate * self.nested.inner.rate)
        x = x + self.shift + self.plain + self.listing[0]
        return x * self.listed[0].rate * self.table["a"].rate * self.pair[1].rate * SCALE[0]


class Hook:
    def __call__(self, module, given, result):
        return result + 1.0


def compiled(model: nn.Module, x: torch.Tensor) -> piecework.StitchedModule:
    return piecework.compile(model, (x,), config=EAGER)


def captured(model: nn.Module, x: torch.Tensor) -> piecework.StitchedModule:
    stitched = compiled(model, x)
    stitched.capture([4], pad=True)
    return stitched


Way = Callable[[nn.Module, torch.Tensor], piecework.StitchedModule]
ways = pytest.mark.parametrize("way", [compiled, captured], ids=lambda way: way.__name__)


@ways
@pytest.mark.parametrize(
    ("at", "drop"),
    [
        (lambda m: m.read, lambda m: delattr(m, "read")),
        (lambda m: m.nested.inner, lambda m: delattr(m, "nested")),
        (lambda m: m.act, lambda m: delattr(m, "act")),
        (lambda m: m.linear, lambda m: setattr(m, "linear", nn.Linear(4, 4))),
        (lambda m: m.layers[0], lambda m: setattr(m, "layers", nn.ModuleList([nn.Linear(4, 4)]))),
        (lambda m: m.listed[0], lambda m: m.listed.clear()),
        (lambda m: m.table["a"], lambda m: m.table.clear()),
        (lambda m: m.pair[1], lambda m: setattr(m, "pair", (Thing(),))),
        (
            lambda m: next(iter(m.linear._forward_hooks.values())),
            lambda m: m.linear._forward_hooks.clear(),
        ),
    ],
)
def test_what_the_model_drops_is_gone_after_the_next_call(way: Way, at, drop) -> None:
    model, x = Model().eval(), torch.randn(3, 4)
    stitched = way(model, x)
    stitched(x)
    gone = weakref.ref(at(model))
    drop(model)
    with pytest.raises(PieceworkError):
        stitched(x)
    gc.collect()
    assert gone() is None


@ways
@pytest.mark.parametrize(
    ("at", "replace"),
    [
        (lambda m: m.linear.weight, lambda m: setattr(m, "linear", hooked(nn.Linear(4, 4)))),
        (
            lambda m: m.layers[0].bias,
            lambda m: setattr(m.layers[0], "bias", nn.Parameter(torch.ones(4))),
        ),
        (lambda m: m.shift, lambda m: setattr(m, "shift", torch.zeros(4))),
    ],
)
def test_weights_that_were_replaced_go_with_a_rebind(way: Way, at, replace) -> None:
    model, x = Model().eval(), torch.randn(3, 4)
    stitched = way(model, x)
    stitched(x)
    gone = weakref.ref(at(model))
    replace(model)
    stitched.rebind()
    stitched(x)
    gc.collect()
    assert gone() is None


def hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(Hook())
    return module


@ways
def test_a_model_goes_with_the_last_who_holds_it(way: Way) -> None:
    model, x = Model().eval(), torch.randn(3, 4)
    stitched = way(model, x)
    stitched(x)
    result = stitched(x)
    held = (model, model.linear.weight, model.read, model.pair[0], x, result)
    gone = [weakref.ref(each) for each in held]
    del model, stitched, held, x, result
    gc.collect()
    assert [each() for each in gone] == [None] * 6
