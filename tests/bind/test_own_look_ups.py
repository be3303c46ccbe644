"""Objects that find their attributes in a way of their own: ``__getattribute__``, properties, ``__getattr__``. Each way reads one kind of state, which then changes; a call is right about it, or refused."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable

import pytest
import torch
from models import EAGER
from torch import nn

import piecework
from piecework.errors import CaptureError, InputError

MODULE = sys.modules[__name__]
OPEN = True
ALIASES = {"pace": "rate"}
X = torch.arange(6.0).reshape(2, 3)
State = tuple[Callable[[object], bool], Callable[[object], None]]


class Other:
    def __init__(self) -> None:
        self.open = True
        self.names = ["rate"]
        self.table = {"open": True}
        self.inner = None


def of_cell() -> State:
    flag = True

    def change(held: object) -> None:
        nonlocal flag
        flag = not flag

    return lambda held: flag, change


# What a look-up of the object's own asks, and how the answer is changed.
STATES: dict[str, Callable[[], State]] = {
    "its own value": lambda: (
        lambda held: held.own,
        lambda held: setattr(held, "own", not held.own),
    ),
    "its own dictionary": lambda: (
        lambda held: vars(held).get("spare") is None,
        lambda held: vars(held).update(spare=1),
    ),
    "its class": lambda: (
        lambda held: type(held).OPEN,
        lambda held: setattr(type(held), "OPEN", False),
    ),
    "a global": lambda: (lambda held: OPEN, lambda held: setattr(MODULE, "OPEN", False)),
    "a cell": of_cell,
    "another object": lambda: (
        lambda held: held.other.open,
        lambda held: setattr(held.other, "open", False),
    ),
    "a list": lambda: (
        lambda held: len(held.other.names) == 1,
        lambda held: held.other.names.append("b"),
    ),
    "a dictionary": lambda: (
        lambda held: held.other.table["open"],
        lambda held: held.other.table.update(open=False),
    ),
    "whether another object has something": lambda: (
        lambda held: not hasattr(held.other, "shut"),
        lambda held: setattr(held.other, "shut", 1),
    ),
}


def by_getattribute(answer: Callable[[object], bool]) -> type:
    class Held:
        OPEN = True

        def __init__(self) -> None:
            self.rate, self.own, self.other = 3.0, True, Other()

        def __getattribute__(self, name: str) -> object:
            if name == "rate" and not answer(self):
                raise AttributeError(name)
            return super().__getattribute__(name)

    return Held


def by_class_value(answer: Callable[[object], bool]) -> type:
    """As `by_getattribute`, where the class holds the value."""

    class Held:
        OPEN = True
        rate = 3.0

        def __init__(self) -> None:
            self.own, self.other = True, Other()

        def __getattribute__(self, name: str) -> object:
            if name == "rate" and not answer(self):
                raise AttributeError(name)
            return super().__getattribute__(name)

    return Held


def by_property(answer: Callable[[object], bool]) -> type:
    class Held:
        OPEN = True

        def __init__(self) -> None:
            self.own, self.other = True, Other()

        @property
        def rate(self) -> float:
            if not answer(self):
                raise AttributeError("rate")
            return 3.0

    return Held


def by_property_behind(answer: Callable[[object], bool]) -> type:
    """A property in a class that finds everything in a way of its own, as transformers' configs do."""

    class Held(by_property(answer)):
        aliases = ALIASES

        def __getattribute__(self, name: str) -> object:
            name = super().__getattribute__("aliases").get(name, name)
            return super().__getattribute__(name)

    return Held


def by_getattr(answer: Callable[[object], bool]) -> type:
    class Held:
        OPEN = True

        def __init__(self) -> None:
            self.own, self.other = True, Other()

        def __getattr__(self, name: str) -> object:
            if name == "rate" and answer(self):
                return 3.0
            raise AttributeError(name)

    return Held


class Asks(nn.Module):
    def __init__(self, held: object) -> None:
        super().__init__()
        self.held = held


class HasAttribute(Asks):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if hasattr(self.held, "rate") else x - 7


class GetAttribute(Asks):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * getattr(self.held, "rate", 7.0)


class Tries(Asks):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        try:
            return x * self.held.rate
        except AttributeError:
            return x - 7


WAYS = (by_getattribute, by_class_value, by_property, by_property_behind, by_getattr)
#: Where a ``__getattribute__`` raises, Dynamo finds what the class holds, or gives up.
RAISING = (by_getattribute, by_class_value)
QUESTIONS = (HasAttribute, GetAttribute, Tries)


@pytest.mark.parametrize("first", [True, False], ids=["there", "gone"])
@pytest.mark.parametrize(
    "way, state",
    [*itertools.product(WAYS, STATES)],
    ids=lambda each: getattr(each, "__name__", each),
)
@pytest.mark.parametrize("question", QUESTIONS)
def test_what_a_look_up_of_its_own_reads_is_watched(
    question: type, way: Callable[..., type], state: str, first: bool, monkeypatch
) -> None:
    monkeypatch.setattr(MODULE, "OPEN", True)
    answer, change = STATES[state]()
    held = way(answer if first else lambda held: not answer(held))()
    model = question(held)
    try:
        stitched = piecework.compile(model, (X,), config=EAGER)
    except CaptureError:
        assert way in RAISING and not first
        return
    before = model(X)
    assert torch.equal(stitched(X), before)
    change(held)
    with torch.no_grad():
        assert not torch.equal(model(X), before)
    with pytest.raises(InputError):
        stitched(X)
