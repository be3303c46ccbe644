"""What a trace made constant and a call watches: numbers, flags, modules without weights, hooks; refused when they change, and free of cost while they don't."""

from __future__ import annotations

import functools
import types

import pytest
import torch
from models import EAGER
from torch import nn

import piecework
from piecework.errors import BindError, InputError

RATE = 2.0
GLOBAL = nn.Dropout(0.5).eval()


class Options:
    def __init__(self) -> None:
        self.factor = 3


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.drop = nn.Linear(3, 3), nn.Dropout(0.5)
        self.steps = nn.ModuleList([nn.ReLU(), nn.Tanh()])
        self.scale, self.options, self.unread = 2.0, Options(), 1
        self.register_buffer("shift", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.drop(self.linear(x)) * self.scale * self.options.factor
        for step in self.steps:
            x = step(x)
        return x if self.shift is None else x + self.shift


def compiled(model):
    return piecework.compile(model, (torch.randn(4, 3),), config=EAGER)


CHANGES = {
    "a number": (lambda m: setattr(m, "scale", 5.0), r"scale was 2.0 .* is 5.0 now"),
    "a number of another type": (lambda m: setattr(m, "scale", 2), "scale was 2.0 .* is 2 now"),
    "no number": (lambda m: delattr(m, "scale"), "scale was 2.0 .* is gone now"),
    "an object's": (lambda m: setattr(m.options, "factor", 4), r"options\.factor was 3 .* 4 now"),
    "an object": (lambda m: setattr(m, "options", None), r"options\.factor was 3 .* gone now"),
    "a buffer": (lambda m: setattr(m, "shift", torch.ones(3)), r"shift was None"),
    "a flag": (lambda m: m.drop.train(), r"drop\.training=False and has True now"),
    "a probability": (lambda m: setattr(m.drop, "p", 0.1), r"drop\.p was 0\.5"),
    "a module": (lambda m: setattr(m, "drop", nn.ReLU()), "drop was a Dropout .* is a ReLU now"),
    "an item": (lambda m: m.steps.__setitem__(1, nn.ReLU()), "was a Tanh .* is a ReLU now"),
    "a hook": (lambda m: m.linear.register_forward_hook(print), "linear has another forward, or"),
    "a pre-hook": (lambda m: m.steps[0].register_forward_pre_hook(print), "other forward hooks"),
    "a forward": (lambda m: setattr(m.drop, "forward", torch.relu), "drop has another forward"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_fact_that_changed_is_refused_by_name_until_it_is_put_back(name: str) -> None:
    change, message = CHANGES[name]
    model = Model().eval()
    stitched, x = compiled(model), torch.randn(5, 3)
    expected = model(x)
    torch.testing.assert_close(stitched(x), expected)
    change(model)
    for _ in range(12):  # also after the watched dictionaries count as busy or as quiet
        with pytest.raises(InputError, match=message):
            stitched(x)
    with pytest.raises(BindError, match=r"when the model was traced"):
        stitched.rebind()


def test_values_put_back_and_objects_that_are_as_good_serve_again() -> None:
    model = Model().eval()
    stitched, x = compiled(model), torch.randn(5, 3)
    expected = model(x)
    model.scale = 7.0
    with pytest.raises(InputError):
        stitched(x)
    model.scale = 2.0
    torch.testing.assert_close(stitched(x), expected)
    model.options, model.drop, model.scale = Options(), nn.Dropout(0.5).eval(), float("2")
    for _ in range(12):
        torch.testing.assert_close(stitched(x), expected)
    handle = model.linear.register_forward_hook(lambda *_: None)
    with pytest.raises(InputError):
        stitched(x)
    handle.remove()
    torch.testing.assert_close(stitched(x), expected)
    model.unread, model.options.other = 2, 1
    torch.testing.assert_close(stitched(x), expected)
    model.options.factor = 9
    with pytest.raises(InputError, match="factor was 3"):
        stitched(x)


def test_what_was_set_for_the_trace_alone_can_be_accepted() -> None:
    model = Model().eval()
    model.scale = 4.0
    stitched, x = compiled(model), torch.randn(5, 3)
    expected = model(x)
    model.scale = 2.0
    with pytest.raises(InputError, match=r"scale was 4\.0"):
        stitched(x)
    stitched.accept_settings()
    torch.testing.assert_close(stitched(x), expected)
    model.options.factor = 7
    with pytest.raises(InputError, match="factor was 3"):
        stitched(x)
    with pytest.raises(BindError, match="no trace"):
        piecework.compile(Model(), config=EAGER).accept_settings()


def test_a_model_may_run_its_stitched_self_behind_its_own_hooks() -> None:
    model = Model().eval()
    stitched, x, seen = compiled(model), torch.randn(5, 3), []
    expected = model(x)
    model.forward = lambda x: stitched(x)
    torch.testing.assert_close(model(x), expected)
    model.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(model(x), expected)
    assert seen == [1]
    del model.forward
    with pytest.raises(
        InputError, match="module model has another forward, or other forward hooks"
    ):
        stitched(x)


def _bound(function):
    return lambda model, stitched: types.MethodType(function, model)


def _keeping_its_name(model, stitched):
    return functools.wraps(model.forward)(lambda x: stitched(x))


RUN_IT = {
    "a function": lambda model, stitched: lambda x: stitched(x),
    "a wrapper with its name": _keeping_its_name,
    "a partial": lambda model, stitched: functools.partial(stitched),
    "a method": _bound(lambda self, x: self.run_by(x)),
    "a default": lambda model, stitched: lambda x, run=stitched: run(x),
}
RUN_OTHER = {
    "a function": lambda model, stitched: lambda x: x * 2,
    "a method": _bound(lambda self, x: self.linear(x)),
    "another stitched model's": lambda model, stitched: functools.partial(compiled(Model().eval())),
}


@pytest.mark.parametrize("kind", RUN_IT)
def test_a_forward_that_runs_the_graph_may_stand_in_the_models_place(kind: str) -> None:
    model = Model().eval()
    stitched, x = compiled(model), torch.randn(5, 3)
    expected = model(x)
    vars(model)["run_by"] = stitched if kind == "a method" else None
    model.forward = RUN_IT[kind](model, stitched)
    torch.testing.assert_close(stitched(x), expected)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("kind", RUN_OTHER)
def test_any_other_forward_is_not_what_was_traced(kind: str) -> None:
    model = Model().eval()
    stitched, x = compiled(model), torch.randn(5, 3)
    expected = stitched(x)
    model.forward = RUN_OTHER[kind](model, stitched)
    with pytest.raises(InputError, match="module model has another forward"):
        stitched(x)
    stitched.accept_settings()
    torch.testing.assert_close(stitched(x), expected)


def test_hooks_that_come_and_go_at_every_call_are_seen_each_time() -> None:
    model = Model().eval()
    stitched, x = compiled(model), torch.randn(5, 3)
    for _ in range(30):
        handle = model.linear.register_forward_hook(lambda *_: None)
        with pytest.raises(InputError, match="forward hooks"):
            stitched(x)
        handle.remove()
        torch.testing.assert_close(stitched(x), model(x))


def test_globals_closures_partials_and_objects_are_watched(monkeypatch) -> None:
    def through_globals(x):
        return GLOBAL(x) * RATE

    inner = Model().eval()

    def through_closure(x):
        return inner(x) + 1

    class Plain:
        def __init__(self) -> None:
            self.inner = inner

        def run(self, x):
            return self.inner(x) - 1

    plain, x = Plain(), torch.randn(5, 3)
    partial = functools.partial(lambda module, x: module(x) * 2, inner)
    made = [compiled(each) for each in (through_closure, plain.run, partial)]
    from_globals = compiled(through_globals)
    for stitched in (*made, from_globals):
        torch.testing.assert_close(stitched(x), stitched.model(x))
    inner.drop.train()
    for stitched in made:
        with pytest.raises(InputError, match="training"):
            stitched(x)
    inner.eval()
    for stitched in made:
        torch.testing.assert_close(stitched(x), stitched.model(x))
    monkeypatch.setitem(globals(), "RATE", 3.0)
    with pytest.raises(InputError, match=r"RATE was 2.0 .* is 3.0 now"):
        from_globals(x)
    monkeypatch.undo()
    torch.testing.assert_close(from_globals(x), through_globals(x))
    GLOBAL.train()
    try:
        with pytest.raises(InputError, match="training"):
            from_globals(x)
    finally:
        GLOBAL.eval()
