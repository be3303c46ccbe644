"""Results of unusual kinds: in, forwards that return dataclasses, or instances of other classes; out, equal ones at every call, sizes included."""

from __future__ import annotations

import abc
import collections
import enum
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from models import EAGER

import piecework
from piecework.errors import CaptureError
from piecework.runtime import torch_compat


class Kind(enum.Enum):
    WARM = 1


@dataclass
class Scores:
    values: torch.Tensor
    rows: int = 0
    names: list[str] = field(default_factory=list)

    @property
    def total(self) -> torch.Tensor:
        return self.values.sum()


@dataclass(frozen=True)
class Frozen:
    scores: Scores
    shape: tuple[int, ...]
    kind: Kind = Kind.WARM


@dataclass(slots=True)
class Slotted:
    first: torch.Tensor
    second: torch.Tensor | None = None


@dataclass
class Derived(Scores):
    """Has an attribute that is no field."""

    def __post_init__(self) -> None:
        self.doubled = self.values * 2


FORWARDS = {
    "plain": lambda x: Scores(x * 2, x.shape[0], ["a"]),
    "in a list": lambda x: [
        Scores(x * 2, 3),
        {"b": Slotted(x + 1)},
        Frozen(Scores(x + 1), x.shape),
    ],
    "frozen, nested": lambda x: Frozen(Scores(x.relu(), x.size(0) + 1), tuple(x.shape)),
    "with slots": lambda x: Slotted(x + 1, x[:, 0]),
    "with more than fields": lambda x: Derived(x + 1, x.shape[0]),
    "argument inside": lambda x: Scores(x, 0),
}


@pytest.mark.parametrize("name", FORWARDS)
def test_dataclass_is_returned(name: str) -> None:
    returned_as_made(FORWARDS[name])


def returned_as_made(forward: Callable[[torch.Tensor], object]) -> None:
    """A stitched ``forward`` returns what it returns itself, made anew in each call."""
    stitched = piecework.compile(forward, (torch.randn(4, 3),), config=EAGER)
    for rows in (4, 2, 7, 1):
        x = torch.randn(rows, 3)
        got, expected = stitched(x), forward(x)
        same(got, expected)
        assert stitched(x) is not got


def same(got: object, expected: object) -> None:
    assert type(got) is type(expected)
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(got, expected)
    elif isinstance(expected, (list, tuple)):
        for one, two in zip(got, expected, strict=True):
            same(one, two)
    elif isinstance(expected, dict):
        assert list(got) == list(expected)
        same(list(got.values()), list(expected.values()))
    elif hasattr(expected, "__dataclass_fields__") or isinstance(
        expected, (Layer, Cache, collections.UserDict)
    ):
        names = [
            *getattr(expected, "__dataclass_fields__", ()),
            *getattr(expected, "__dict__", ()),
        ]
        assert list(getattr(got, "__dict__", ())) == list(getattr(expected, "__dict__", ()))
        for name in names:
            same(getattr(got, name), getattr(expected, name))
    else:
        assert got == expected


def test_methods_of_a_returned_dataclass_work() -> None:
    stitched = piecework.compile(lambda x: Scores(x * 2), (torch.randn(4, 3),), config=EAGER)
    assert stitched(torch.ones(2, 3)).total == 12


# --- instances of plain classes -----------------------------------------------------------------------


class Filled(abc.ABC):
    @abc.abstractmethod
    def fill(self, x: torch.Tensor) -> Filled: ...


class Layer(Filled):
    """What a model keeps for its next call; it has an attribute only once it was filled."""

    def __init__(self) -> None:
        self.keys: torch.Tensor | None = None
        self.length = 0

    def fill(self, x: torch.Tensor) -> Layer:
        self.keys, self.dtype = x * 2, x.dtype
        self.length += x.shape[0]
        return self


class Cache:
    def __init__(self, *layers: Layer) -> None:
        self.layers = list(layers)
        self.kind = Layer
        self.shape: object = None


def _with_shape(x: torch.Tensor) -> Cache:
    made = Cache(Layer().fill(x))
    made.shape = {"whole": x.shape, "rows": x.size(0) + 1}
    return made


HELD = Cache(Layer())
INSTANCES = {
    "alone": lambda x: Layer().fill(x),
    "nested": lambda x: Cache(Layer().fill(x), Layer(), Layer().fill(x + 1)),
    "sizes inside": _with_shape,
    "beside others": lambda x: {"a": [Layer().fill(x), x], "b": Scores(x, x.shape[0])},
    "user dict": lambda x: collections.UserDict(keys=x * 2, rows=x.shape[0]),
}
lists_attributes = pytest.mark.skipif(
    not torch_compat.lists_attributes(), reason="Dynamo of this torch lists no attributes"
)


@lists_attributes
@pytest.mark.parametrize("name", INSTANCES)
def test_an_instance_of_a_plain_class_is_returned(name: str) -> None:
    returned_as_made(INSTANCES[name])


class Slots:
    __slots__ = ("first",)

    def __init__(self, first: torch.Tensor) -> None:
        self.first = first


class Watched:
    def __init__(self, x: torch.Tensor) -> None:
        self.first = x

    def __setattr__(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)


class Ring:
    def __init__(self, x: torch.Tensor) -> None:
        self.first, self.me = x, self


COUNTED: list[object] = []


class Counted:
    def __init__(self, x: torch.Tensor) -> None:
        self.first = x
        COUNTED.append(self)


def _twice(x: torch.Tensor) -> list[Layer]:
    made = Layer().fill(x)
    return [made, made]


REFUSED = {
    "held by a global": lambda x: (x * 2, HELD),
    "held, in a dataclass": lambda x: (x * 2, Scores(x, names=[HELD])),
    "twice": _twice,
    "with slots": lambda x: Slots(x),
    "with a way to set": lambda x: Watched(x),
    "that refers to itself": lambda x: Ring(x),
    "that is kept elsewhere": lambda x: Counted(x),
    "an exception": lambda x: ValueError("x"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_instance_that_is_more_than_its_attributes_is_refused(name: str) -> None:
    forward, before = REFUSED[name], dict(vars(HELD))
    with pytest.raises(CaptureError):
        piecework.compile(forward, (torch.randn(4, 3),), config=EAGER)
    assert vars(HELD) == before and type(HELD.layers[0]) is Layer and not COUNTED


def test_a_view_attribute_of_an_argument_is_refused_before_torch_2_15() -> None:
    if torch.__version__ < (2, 15):
        with pytest.raises(CaptureError, match="can't be rebuilt from the graph"):
            piecework.compile(lambda x: x.T, (torch.randn(4, 3),), config=EAGER)
        return
    stitched, x = piecework.compile(lambda x: x.T, (torch.randn(4, 3),), config=EAGER), torch.ones(
        5, 3
    )
    assert torch.equal(stitched(x), x.T) and stitched(x).data_ptr() == x.data_ptr()
