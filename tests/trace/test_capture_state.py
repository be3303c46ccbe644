"""What compiling does to the user's objects: nothing. A forward that keeps state in Python is refused by name, one that writes tensors in place is not."""

from __future__ import annotations

import copy
from collections import deque

import pytest
import torch
from models import EAGER
from torch import nn
from torch.overrides import TorchFunctionMode

import piecework
from piecework.errors import CaptureError

X = torch.randn(4, 3)
KEPT = {"n": 0, "t": None}
TOTAL = 0


class Model(nn.Module):
    """Whatever a forward might keep its state in."""

    def __init__(self, write) -> None:
        super().__init__()
        self.write = write
        self.register_buffer("count", torch.zeros(3))
        self.register_buffer("cache", torch.zeros(5, 3))
        self.inner = nn.Module()
        self.inner.register_buffer("count", torch.zeros(3))
        self.weight = nn.Parameter(torch.zeros(3), requires_grad=False)
        self.number, self.flag, self.last = 1, True, None
        self.items, self.nested = [1], {"a": [torch.zeros(3)]}
        self.names, self.queue = {"x"}, deque([1])
        self.plain = Plain()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.write(self, x)
        return x + self.count + self.inner.count + self.cache.sum(0) + self.weight


class Plain:
    def __init__(self) -> None:
        self.calls = 0


def replaces_buffer(self, x):
    self.count = self.count + 1


def replaces_inner_buffer(self, x):
    self.inner.count = x[0]


def replaces_parameter(self, x):
    self.weight.data = x[0]


def keeps_result(self, x):
    self.last = x * 2


def counts(self, x):
    self.number += 1


def writes_list(self, x):
    self.items[0] = 2


def appends(self, x):
    self.items.append(x)


def writes_nested(self, x):
    self.nested["a"][0] = x[0] * 2


def adds_key(self, x):
    self.nested["b"] = x


def adds_to_set(self, x):
    self.names.add("y")


def adds_to_deque(self, x):
    self.queue.append(2)


def writes_object(self, x):
    self.plain.calls += 1


def adds_attribute(self, x):
    self.seen = True


def writes_global(self, x):
    KEPT["t"] = x * 2


def replaces_global(self, x):
    global TOTAL
    TOTAL = TOTAL + 1


REFUSED = {
    replaces_buffer: "own state: count",
    replaces_inner_buffer: "own state: inner.count",
    keeps_result: "own state: last",
    counts: "own state: number",
    writes_list: "own state: items",
    appends: "own state: items",
    writes_nested: r"own state: nested\['a'\]",
    adds_key: "own state: nested",
    adds_to_set: "own state: names",
    adds_to_deque: "own state: queue",
    writes_object: r"own state: plain\.calls",
    adds_attribute: "own state: seen",
    writes_global: "global .*KEPT",
    replaces_global: "global .*TOTAL",
}


def contents(value, seen=None):
    """Everything under ``value``, by identity of the leaves."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return ()
    seen.add(id(value))
    if isinstance(value, (nn.Module, Plain)):
        return contents(value.__dict__, seen)
    if isinstance(value, dict):
        return {key: contents(each, seen) for key, each in value.items()}
    if isinstance(value, (list, deque)):
        return [contents(each, seen) for each in value]
    return frozenset(value) if isinstance(value, set) else id(value)


@pytest.mark.parametrize("write", REFUSED, ids=lambda write: write.__name__)
def test_state_that_a_graph_would_not_keep_is_refused_by_name_and_left_as_it_was(write) -> None:
    model = Model(write)
    before, values = contents(model), [each.clone() for each in model.buffers()]
    outside = dict(KEPT), TOTAL
    with pytest.raises(CaptureError, match=REFUSED[write]) as raised:
        piecework.compile(model, (X,), config=EAGER)
    assert contents(model) == before
    assert all(map(torch.equal, model.buffers(), values))
    assert (dict(KEPT), TOTAL) == outside
    assert raised.value.where.startswith("test_capture_state.py:")
    assert raised.value.where.endswith(f" in {write.__name__}")


def adds_in_place(self, x):
    self.count.add_(1)


def adds_by_operator(self, x):
    self.count += 1
    self.inner.count -= 2


def assigns_rows(self, x):
    self.cache[1] = x[0]
    self.cache[2:4].copy_(x[:2])


def assigns_what_it_wrote(self, x):
    self.count = self.count.mul_(2).add_(1)


def writes_the_same_again(self, x):
    self.flag, self.number, self.last = True, 1, None
    self.items[0] = 1
    self.names.add("x")
    self.plain.calls = 0
    self.inner = self.inner
    self.count.add_(1)


@pytest.mark.parametrize(
    "write",
    [adds_in_place, adds_by_operator, assigns_rows, assigns_what_it_wrote, writes_the_same_again],
    ids=lambda write: write.__name__,
)
def test_tensors_written_in_place_are_the_models_own_in_every_call(write) -> None:
    model = Model(write)
    reference, before = copy.deepcopy(model), contents(model)
    stitched = piecework.compile(model, (X,), config=EAGER)
    assert contents(model) == before
    assert not any(each.any() for each in model.buffers())
    for rows in (4, 2, 7):
        x = torch.randn(rows, 3)
        torch.testing.assert_close(stitched(x), reference(x))
        for ours, expected in zip(model.buffers(), reference.buffers(), strict=True):
            torch.testing.assert_close(ours, expected)
    assert contents(model) == before


def test_arguments_are_left_as_they_were() -> None:
    def forward(x, options, found):
        options["y"] = x * 2
        found.append(x)
        return x + 1

    options, found = {"q": X}, []
    with pytest.raises(CaptureError, match=r"its argument options.*in forward"):
        piecework.compile(forward, (X, options, found), config=EAGER)
    assert list(options) == ["q"] and found == []


def test_closures_are_left_as_they_were() -> None:
    count = 0

    def forward(x):
        nonlocal count
        count += 1
        return x + 1

    with pytest.raises(CaptureError, match=r"own state: .*cell_contents"):
        piecework.compile(forward, (X,), config=EAGER)
    assert count == 0


def test_a_compilation_that_fails_changes_nothing() -> None:
    def forward(self, x):
        self.items.append(1)
        self.count += 1
        if x.sum() > 0:
            self.last = x

    model = Model(forward)
    before = contents(model)
    with pytest.raises(CaptureError, match="one graph"):
        piecework.compile(model, (X,), config=EAGER)
    assert contents(model) == before and not model.count.any()


def test_a_tensors_hook_is_refused() -> None:
    def forward(x):
        x.register_hook(lambda grad: grad)
        return x * 2

    with pytest.raises(CaptureError, match="hook"):
        piecework.compile(forward, (X.clone().requires_grad_(),), config=EAGER)


class PlainMode(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return function(*args, **(kwargs or {}))


class Moded(torch.nn.Module):
    """Runs a part of itself in a torch function mode, as transformers' masks are made."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.mode = way, PlainMode()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.way == "with":
            with PlainMode():
                return torch.add(x, 1)
        self.mode.__enter__()
        y = torch.add(x, 1)
        if self.way == "left":
            self.mode.__exit__(None, None, None)
        return y


@pytest.mark.parametrize("way", ["with", "left"])
def test_a_mode_that_is_left_again_is_no_change(way: str) -> None:
    stitched = piecework.compile(Moded(way), (torch.randn(4, 3),), config={"backend": "eager"})
    x = torch.randn(2, 3)
    assert torch.equal(stitched(x), x + 1)


def test_a_mode_that_stays_entered_is_refused() -> None:
    with pytest.raises(CaptureError, match="torch function modes that are entered"):
        piecework.compile(Moded("never"), (torch.randn(4, 3),), config={"backend": "eager"})


def test_weights_that_a_first_call_makes() -> None:
    model = torch.nn.Sequential(torch.nn.LazyLinear(3), torch.nn.ReLU())
    x = torch.randn(4, 8)
    with pytest.raises(CaptureError, match="no weights before its first call"):
        piecework.compile(model, (x,), config=EAGER)
    expected = model(x)
    torch.testing.assert_close(piecework.compile(model, (x,), config=EAGER)(x), expected)


def test_a_parameter_that_is_never_made_nor_used() -> None:
    class Model(torch.nn.Linear):
        def __init__(self) -> None:
            super().__init__(8, 3)
            self.unused = torch.nn.UninitializedParameter()

    model, x = Model(), torch.randn(4, 8)
    torch.testing.assert_close(piecework.compile(model, (x,), config=EAGER)(x), model(x))
