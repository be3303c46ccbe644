"""Results: numbers and sizes of each call and never the example's, dataclasses and instances of other classes, made anew in each."""

from __future__ import annotations

import abc
import collections
import enum
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from models import EAGER
from torch import nn

import piecework
from piecework.errors import CaptureError, InputError
from piecework.runtime import torch_compat

Sizes = namedtuple("Sizes", "rows shape")


class Kind(enum.Enum):
    WARM = 1


@dataclass
class Scores:
    values: torch.Tensor
    rows: int = 0
    names: list[object] = field(default_factory=list)

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
    def __init__(self, *layers: Layer, shape: object = None) -> None:
        self.layers, self.kind, self.shape = list(layers), Layer, shape


HELD = Cache(Layer())
DATACLASSES = {
    "plain": lambda x: Scores(x * 2, x.shape[0], ["a"]),
    "in a list": lambda x: [Scores(x * 2, 3), {"b": Slotted(x + 1, x[:, 0])}, Scores(x, 0)],
    "frozen, nested": lambda x: Frozen(Scores(x.relu(), x.size(0) + 1), x.shape),
    "with more than fields": lambda x: Derived(x + 1, x.shape[0]),
}
INSTANCES = {
    "alone": lambda x: Layer().fill(x),
    "nested": lambda x: Cache(Layer().fill(x), Layer(), Layer().fill(x + 1)),
    "sizes inside": lambda x: Cache(Layer().fill(x), shape={"all": x.shape, "n": x.size(0) + 1}),
    "beside others": lambda x: {"a": [Layer().fill(x), x], "b": Scores(x, x.shape[0])},
    "user dict": lambda x: collections.UserDict(keys=x * 2, rows=x.shape[0]),
}
LISTED = torch_compat.lists_attributes()


def compiled(function: Callable[..., object], *args: object) -> piecework.StitchedModule:
    return piecework.compile(function, args, config=EAGER)


def same(got: object, expected: object) -> None:
    assert type(got) is type(expected)
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(got, expected)
    elif isinstance(expected, (list, tuple)):
        for one, two in zip(got, expected, strict=True):  # type: ignore[call-overload]
            same(one, two)
    elif isinstance(expected, dict):
        assert list(got) == list(expected)  # type: ignore[call-overload]
        same(list(got.values()), list(expected.values()))  # type: ignore[attr-defined]
    elif isinstance(expected, (Scores, Frozen, Slotted, Layer, Cache, collections.UserDict)):
        names = [*getattr(expected, "__slots__", ()), *getattr(expected, "__dict__", ())]
        assert list(getattr(got, "__dict__", ())) == list(getattr(expected, "__dict__", ()))
        for name in names:
            same(getattr(got, name), getattr(expected, name))
    else:
        assert got == expected


@pytest.mark.parametrize("name", [*DATACLASSES, *(INSTANCES if LISTED else ())])
def test_a_result_is_returned_as_it_was_made_and_made_anew_in_each_call(name: str) -> None:
    forward = {**DATACLASSES, **INSTANCES}[name]
    stitched = compiled(forward, torch.randn(4, 3))
    for rows in (4, 2, 7, 1):
        x = torch.randn(rows, 3)
        got = stitched(x)
        same(got, forward(x))
        assert stitched(x) is not got
    if name == "plain":
        assert stitched(torch.ones(2, 3)).total == 12


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
    "held by a global": (lambda x: (x * 2, HELD), r"the global .*HELD\.layers"),
    "held, in a dataclass": (lambda x: (x * 2, Scores(x, names=[HELD])), None),
    "twice": (_twice, "one Layer twice"),
    "with slots": (lambda x: Slots(x), "can't be rebuilt"),
    "with a way to set": (lambda x: Watched(x), None),
    "that refers to itself": (lambda x: Ring(x), None),
    "that is kept elsewhere": (lambda x: Counted(x), None),
    "an exception": (lambda x: ValueError("x"), None),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_instance_that_is_more_than_its_attributes_is_refused(name: str) -> None:
    (forward, says), before = REFUSED[name], dict(vars(HELD))
    with pytest.raises(CaptureError, match=says if LISTED else None):
        compiled(forward, torch.randn(4, 3))
    assert vars(HELD) == before and type(HELD.layers[0]) is Layer and not COUNTED


def test_a_view_attribute_of_an_argument_is_refused_before_torch_2_15() -> None:
    if torch.__version__ < (2, 15):
        with pytest.raises(CaptureError, match="can't be rebuilt from the graph"):
            compiled(lambda x: x.T, torch.randn(4, 3))
        return
    stitched, x = compiled(lambda x: x.T, torch.ones(4, 3)), torch.ones(5, 3)
    assert torch.equal(stitched(x), x.T) and stitched(x).data_ptr() == x.data_ptr()


# --- numbers and sizes --------------------------------------------------------------------------------

FUNCTIONS = {
    "shape": lambda x: (x * 2, x.shape),
    "size": lambda x: (x * 2, x.size()),
    "one size": lambda x: (x * 2, x.size(0), x.shape[-1]),
    "rows": lambda x: (x * 2, len(x)),
    "part of a shape": lambda x: (x * 2, x.shape[:1], x.shape[1:]),
    "plain containers": lambda x: {"y": x * 2, "s": [x.shape, (x.shape[0], list(x.shape))]},
    "a shape of the result": lambda x: (y := x * 2, y.shape, y[1:].shape),
    "arithmetic": lambda x: (x * 2, x.shape[0] * 2 + 1, x.numel(), x.shape[0] // 2),
    "float": lambda x: (x * 2, x.shape[0] * 0.5, x.shape[0] / 3),
    "float and tensor": lambda x: (
        torch.tensor(2.0, dtype=torch.float64) * x.shape[0],
        x.shape[0] / 4,
        x * 2,
    ),
    "named tuple": lambda x: (x * 2, Sizes(x.shape[0], x.shape)),
    "ordered": lambda x: OrderedDict(y=x * 2, n=x.shape[0], s=x.shape),
    "twice": lambda x: (x * 2, x.shape[0], x.shape[0]),
    "fixed": lambda x: (x * 2, 3, 2.5, True, "text", torch.Size([2, 2])),
    "text": lambda x: (x * 2, f"{x.shape[0]}", f"{x.shape[0]} rows"),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_sizes_in_results_are_those_of_the_call(name: str) -> None:
    function = FUNCTIONS[name]
    stitched = compiled(function, torch.randn(4, 3))
    for shape in ((7, 3), (4, 3), (2, 5), (1, 3), (4, 6)):
        x = torch.randn(shape)
        same(stitched(x), function(x))


def test_an_integer_argument_is_returned_as_it_was_passed() -> None:
    def function(x, k):
        return x * k, k, k + 1, [k]

    stitched = compiled(function, torch.randn(4, 3), 3)
    x = torch.randn(5, 3)
    for k in (3, 5, 12):
        same(stitched(x, k), function(x, k))


def test_an_integer_argument_that_the_trace_fixed_is_checked() -> None:
    def function(x, k):
        return x.reshape(-1, 3 if k == 3 else 1), k

    stitched = compiled(function, torch.randn(4, 3), 3)
    x = torch.randn(5, 3)
    same(stitched(x, 3), function(x, 3))
    with pytest.raises(InputError, match="k"):
        stitched(x, 5)


def test_a_class_of_results_keeps_its_numbers_current() -> None:
    transformers = pytest.importorskip("transformers.modeling_outputs")

    def function(x):
        return transformers.BaseModelOutput(last_hidden_state=x * 2, hidden_states=(x.shape[0],))

    stitched = compiled(function, torch.randn(4, 3))
    for rows in (7, 2):
        result = stitched(torch.ones(rows, 3))
        assert type(result) is transformers.BaseModelOutput
        assert result.hidden_states == (rows,)


def test_captured_batches_return_the_callers_sizes() -> None:
    linear = nn.Linear(3, 3).requires_grad_(False)

    def function(x):
        return linear(x), x.shape, x.shape[0] * 2

    x = torch.randn(4, 3)
    torch._dynamo.mark_dynamic(x, 0)
    stitched = compiled(function, x)
    stitched.capture([2, 4, 8], progress=False, estimate=False)
    for rows in (2, 3, 4, 7):
        y, shape, double = stitched(torch.ones(rows, 3))
        assert y.shape == (rows, 3)
        same((shape, double), (torch.Size([rows, 3]), 2 * rows))


# --- texts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        lambda n: f"{n}",
        lambda n: str(n),
        lambda n: f"a{n}",
        lambda n: "{}".format(n),  # noqa: UP032
        lambda n: [f"{n}", 1, {"a": f"b{n}"}],
    ],
)
def test_text_of_an_integer_argument(text: Callable[[int], object]) -> None:
    def model(x: torch.Tensor, n: int) -> Any:
        return x * n, text(n)

    x = torch.randn(4, 8)
    stitched = compiled(model, x, 5)
    assert stitched(x, 5)[1] == model(x, 5)[1]
    with pytest.raises(InputError, match="argument n has value 7"):
        stitched(x, 7)
