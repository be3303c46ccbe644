"""Plain values that a trace read: told as text, compared with another model."""

from __future__ import annotations

import enum

import pytest
import torch
from models import EAGER
from torch import nn

import piecework
from piecework.runtime.watch.state import SavedState, TracedState
from piecework.runtime.watch.values import Untellable, plain_text

SCALE = 2.0


class Level(enum.Enum):
    LOW = 1
    HIGH = 2


class Options:
    def __init__(self) -> None:
        self.rate, self.sizes, self.table = 2.0, [1, 2], {"a": 1}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.options, self.level, self.act = Options(), Level.LOW, torch.relu

    def forward(self, x):
        x = self.act(self.linear(x)) * self.options.rate * SCALE
        if self.level is Level.LOW and hasattr(self, "linear") and not hasattr(self, "gate"):
            x = x + len(self.options.sizes) + self.options.sizes[1]
        for name, value in self.options.table.items():
            x = x * value + len(name)
        return x


def read_by(model: nn.Module) -> SavedState:
    stitched = piecework.compile(model, (torch.randn(3, 4),), config=EAGER)
    state = stitched.traces[0].entry.now.weights.state
    assert not state.untold()
    return state.saved()


def difference(saved: SavedState, model: nn.Module) -> str:
    return TracedState.loaded(saved, model).difference()


@pytest.fixture(scope="module")
def saved() -> SavedState:
    return read_by(Model().eval())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda m: setattr(m.options, "rate", 3.0), "options.rate was 2.0 and is 3.0 now"),
        (lambda m: m.options.sizes.append(3), "options.sizes was 2 items and is 3 items now"),
        (lambda m: setattr(m, "level", Level.HIGH), "Level.LOW"),
        (lambda m: setattr(m, "act", torch.tanh), "act was builtin"),
        (lambda m: m.options.table.update(b=1), "options.table"),
        (lambda m: setattr(m, "gate", nn.Linear(4, 4)), "gate"),
        (lambda m: delattr(m.options, "rate"), "options.rate was 2.0 and is not there"),
        (lambda m: setattr(m, "linear", nn.Identity()), "torch.nn.modules.linear.Identity"),
        (lambda m: m.linear.register_forward_hook(print), "_forward_hooks"),
    ],
)
def test_what_the_trace_read_and_is_another_now_is_told(saved, change, told) -> None:
    other = Model().eval()
    assert saved.values and not difference(saved, other)
    change(other)
    assert told in difference(saved, other).replace(" when the model was traced", "")


def test_a_global_that_the_trace_read_is_compared(saved, monkeypatch) -> None:
    monkeypatch.setattr(f"{__name__}.SCALE", 3.0)
    assert "SCALE was 2.0 when the model was traced and is 3.0 now" in difference(saved, Model())


def test_what_the_model_and_an_argument_share_is_compared_in_each_call() -> None:
    class Sharing(Model):
        def forward(self, x, *, level):
            return x * level.value * self.level.value

    model, given = Sharing().eval(), {"level": Level.LOW}
    stitched = piecework.compile(model, (torch.randn(3, 4),), given, config=EAGER)
    loaded = TracedState.loaded(stitched.traces[0].entry.now.weights.state.saved(), model)
    assert not loaded.difference()
    check = loaded.argument_check(stitched.traces[0].entry.plan().parameters)
    assert check((torch.randn(2, 4), Level.LOW)) is None
    assert "level" in str(check((torch.randn(2, 4), Level.HIGH)))


def test_what_another_process_could_not_look_up_is_said_to_be_untold() -> None:
    class Choosing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own = Options()
            self.chosen = {self.own}  # a set of objects has no place that a name leads to

        def forward(self, x):
            return x + 1 if self.own in self.chosen else x

    stitched = piecework.compile(Choosing(), (torch.randn(3, 4),), config=EAGER)
    assert "chosen" in stitched.traces[0].entry.now.weights.state.untold()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, True),
        (1, 1.0),
        (0.0, -0.0),
        (torch.float32, torch.float16),
        ({1, 2}, {1, 3}),
        (Level.LOW, Level.HIGH),
    ],
)
def test_values_that_differ_to_any_code_have_two_texts(one, other) -> None:
    assert plain_text(one) != plain_text(other)
    assert plain_text(one) == plain_text(one)
    with pytest.raises(Untellable, match="identity alone"):
        plain_text(Options())
