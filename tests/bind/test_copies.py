"""Copies that a forward makes of objects: they are what Python's are, or the model is refused."""

from __future__ import annotations

import collections
import copy
import dataclasses
import importlib.util

import pytest
import torch
from models import EAGER

import piecework
from piecework.errors import CaptureError


class Plain:
    def __init__(self) -> None:
        self.rate, self.rates = 3, [1, 2]


@dataclasses.dataclass
class Record:
    rate: int = 3
    rates: list[int] = dataclasses.field(default_factory=lambda: [1, 2])


class Slotted:
    __slots__ = ("rate",)

    def __init__(self) -> None:
        self.rate = 5


class Reduced:
    def __init__(self, rate: int = 3) -> None:
        self.rate = rate

    def __reduce__(self):
        return Reduced, (self.rate * 2,)


class Stated(Plain):
    def __getstate__(self):
        return {"rate": 9, "rates": []}


class Restored(Plain):
    def __setstate__(self, state) -> None:
        self.rate = state["rate"] * 7


class Copied(Plain):
    def __copy__(self):
        made = Copied()
        made.rate = 11
        return made


class Table(dict):
    rate = 2


class Row(list):
    rate = 2


def _table() -> Table:
    made = Table(a=1, b=2)
    made.rate = 4
    return made


OBJECTS = {
    "plain": Plain(),
    "record": Record(),
    "slotted": Slotted(),
    "reduced": Reduced(),
    "stated": Stated(),
    "restored": Restored(),
    "copied": Copied(),
    "table": _table(),
    "row": Row([1, 2, 3]),
    "counter": collections.Counter(a=3, b=2),
    "ordered": collections.OrderedDict(a=3, b=2),
    "default": collections.defaultdict(int, a=3),
    "deque": collections.deque([1, 2], maxlen=4),
    "chain": collections.ChainMap({"a": 3}, {"b": 2}),
    "user dict": collections.UserDict(a=3),
    "dict": {"a": [1, 2]},
    "set": {1, 2},
    "text": "ab",
}
READS = {
    "rate": lambda held: getattr(held, "rate", 0),
    "rates": lambda held: len(getattr(held, "rates", ())),
    "items": lambda held: len(held) if hasattr(held, "__len__") else 0,
    "true": lambda held: 2 if held else 3,
}


copies_are_traced = pytest.mark.skipif(
    importlib.util.find_spec("torch._dynamo.polyfills.copy") is None,
    reason="Dynamo of this torch refuses every copy",
)


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy])
@pytest.mark.parametrize("name", OBJECTS)
def test_a_copy_in_a_forward_is_pythons_or_refused(name: str, make) -> None:
    held, x = OBJECTS[name], torch.randn(3, 4)
    for what, read in READS.items():

        def forward(x: torch.Tensor) -> torch.Tensor:
            return x * read(make(held))  # noqa: B023

        try:
            stitched = piecework.compile(forward, (x,), config=EAGER)
        except CaptureError:
            continue
        assert torch.equal(stitched(x), forward(x)), what


@copies_are_traced
def test_copies_that_are_refused_say_of_what() -> None:
    counter = OBJECTS["counter"]
    with pytest.raises(CaptureError, match="forward copies objects, and one of Counter") as raised:
        piecework.compile(lambda x: x * len(copy.copy(counter)), (torch.randn(3, 4),), config=EAGER)
    assert "a method of the object's own" in raised.value.hint


@copies_are_traced
@pytest.mark.parametrize("name", ["plain", "record", "restored", "copied"])
def test_plain_objects_are_copied(name: str) -> None:
    held, x = OBJECTS[name], torch.randn(3, 4)
    stitched = piecework.compile(lambda x: x * copy.copy(held).rate, (x,), config=EAGER)
    assert torch.equal(stitched(x), x * copy.copy(held).rate)
