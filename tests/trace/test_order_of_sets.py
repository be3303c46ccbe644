"""Forwards that go through sets: Dynamo goes in the order in which things were put in, Python by their hashes. What is served equals what the model gives; all else is refused."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable

import pytest
import torch
from models import EAGER

import piecework
from piecework.errors import CaptureError

HELD = [33, 1, 17, 9, 2, 64, 25]
NAMED = {"alpha": 1.0, "beta": 2.0, "gamma": 3.0, "delta": 4.0}
Values = Callable[[], object]
ORDERED: dict[str, Values] = {
    "literal": lambda: {33, 1, 17, 9, 2, 64, 25},
    "of a list": lambda: set(HELD),
    "frozen": lambda: frozenset(HELD),
    "comprehension": lambda: {each * 7 for each in HELD},
    "difference": lambda: set(HELD) - {1},
    "union": lambda: set(HELD) | {33, 40, 8, 0},
    "put in again": lambda: [each for each in put_in_again()],
    "as a list": lambda: list(set(HELD)),
    "keys less a set": lambda: [NAMED[each] for each in NAMED.keys() - {"alpha"}],
    "keys and more": lambda: [NAMED.get(each, 9.0) for each in NAMED.keys() | {"zeta", "eta"}],
}


def put_in_again() -> set[int]:
    found = {1, 9, 17}
    found.discard(1)
    found.add(1)
    return found


class Folding(torch.nn.Module):
    """What it gives depends on the order of the values."""

    def __init__(self, values: Values) -> None:
        super().__init__()
        self.values = values

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for each in self.values():  # type: ignore[attr-defined]
            x = x * 2 + each
        return x


def served(model: torch.nn.Module, x: torch.Tensor) -> bool:
    """Whether the model is served, and then as it is; it may be refused."""
    try:
        stitched = piecework.compile(model.eval(), (x,), config=EAGER)
    except CaptureError as error:
        assert "goes through a set whose order decides" in str(error)
        return False
    torch.testing.assert_close(stitched(x), model(x), rtol=0, atol=0)
    return True


@pytest.mark.parametrize("name", ORDERED)
def test_an_order_that_matters_is_pythons_or_refused(name: str) -> None:
    values = ORDERED[name]
    taken_in_order = served(Folding(values), torch.ones(2))
    # With these numbers Python's order is not the one in which they are put in.
    assert not (taken_in_order and name in ("of a list", "frozen", "as a list", "comprehension"))


@pytest.mark.parametrize("seed", range(12))
def test_random_sets(seed: int) -> None:
    chosen = random.Random(seed)
    items = chosen.sample(range(200), chosen.randint(2, 6))
    more = chosen.sample(range(200), 3)
    ways: list[Values] = [
        lambda: set(items),
        lambda: set(items) | set(more),
        lambda: set(items + more) - set(more),
        lambda: sorted(set(items + more)),
        lambda: [max(set(items)), len(set(items) & set(more))],
    ]
    for way in ways:
        order_is_pythons = served(Folding(way), torch.ones(2))
        assert order_is_pythons or way not in ways[3:]


class PerKind(torch.nn.Module):
    """As models with several kinds of layers do: the order in which the entries are made does not matter."""

    kinds = ("sliding", "full", "chunked", "full", "sliding")

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.ParameterDict({kind: torch.rand(3) for kind in set(self.kinds)})
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = {kind: torch.sin(x) * self.scale[kind] for kind in set(self.kinds)}
        for kind in self.kinds:
            x = x + made[kind]
        self.seen.add_(1)
        return x + self.seen


def test_an_order_that_does_not_matter_is_served() -> None:
    model, again, x = PerKind().eval(), PerKind().eval(), torch.randn(2, 3)
    again.load_state_dict(model.state_dict())
    stitched = piecework.compile(model, (x,), config=EAGER)
    assert torch.equal(model.seen, torch.zeros(3))
    for _ in range(2):
        assert torch.equal(stitched(x), again(x))


class Packing(torch.nn.Module):
    """The order is in the result alone."""

    def forward(self, x: torch.Tensor) -> dict[int, torch.Tensor]:
        return {each: x + 1 for each in set(HELD)}


def test_the_order_of_a_result_is_looked_at() -> None:
    with pytest.raises(CaptureError, match="goes through a set whose order decides"):
        piecework.compile(Packing(), (torch.ones(2),), config=EAGER)


class Writing(torch.nn.Module):
    """The order is in what is left in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("state", torch.zeros(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for each in set(HELD):
            self.state.mul_(2).add_(each)
        return x + 1


def test_the_order_of_writes_is_looked_at() -> None:
    model = Writing()
    with pytest.raises(CaptureError, match="goes through a set whose order decides"):
        piecework.compile(model.eval(), (torch.ones(2),), config=EAGER)
    assert torch.equal(model.state, torch.zeros(2))


@functools.cache
def remembered(size: int) -> torch.Tensor:
    return torch.arange(float(size))


class Remembering(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum((x * each for each in set(HELD[:2])), remembered(x.shape[0]))


def test_no_function_remembers_what_was_looked_at() -> None:
    model, x = Remembering().eval(), torch.ones(3)
    stitched = piecework.compile(model, (x,), config=EAGER)
    assert type(remembered(3)) is torch.Tensor
    assert torch.equal(stitched(x), model(x))


class OfData(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        names = {"a", "b"}
        names.add("c")
        return x[x > 0].sum() * len(names)


def test_what_cannot_be_seen_without_data_is_refused() -> None:
    dynamic = torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
    with dynamic, pytest.raises(CaptureError, match="can't be seen without data"):
        piecework.compile(OfData().eval(), (torch.ones(3),), config=EAGER)
