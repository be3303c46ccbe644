"""What compiling does to the user's objects: nothing. A forward that keeps state in Python is refused by name, one that writes tensors in place is not."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import EAGER
from torch import nn
from torch.overrides import BaseTorchFunctionMode

import piecework
from piecework.errors import CaptureError

X = torch.randn(4, 3)
KEPT = {"n": 0, "t": None}
TOTAL = 0


class Plain:
    def __init__(self) -> None:
        self.calls = 0


class Model(nn.Module):
    """Whatever a forward might keep its state in."""

    def __init__(self, write: Callable[..., object]) -> None:
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


def writes(code: str) -> Callable[[Any, torch.Tensor], None]:
    names: dict[str, Any] = {"KEPT": KEPT}
    exec(f"def write(self, x):\n    global TOTAL\n    {code}\n", globals(), names)
    return names["write"]  # type: ignore[no-any-return]


REFUSED = {
    "self.count = self.count + 1": "own state: count",
    "self.inner.count = x[0]": "own state: inner.count",
    "self.last = x * 2": "own state: last",
    "self.number += 1": "own state: number",
    "self.items[0] = 2": "own state: items",
    "self.items.append(x)": "own state: items",
    "self.nested['a'][0] = x[0] * 2": r"own state: nested\['a'\]",
    "self.nested['b'] = x": "own state: nested",
    "self.names.add('y')": "own state: names",
    "self.queue.append(2)": "own state: queue",
    "self.plain.calls += 1": r"own state: plain\.calls",
    "self.seen = True": "own state: seen",
    "KEPT['t'] = x * 2": "global .*KEPT",
    "TOTAL = TOTAL + 1": "global .*TOTAL",
}


def contents(value: Any, seen: set[int] | None = None) -> object:
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


@pytest.mark.parametrize("code", REFUSED)
def test_state_that_a_graph_would_not_keep_is_refused_by_name_and_left_as_it_was(code: str) -> None:
    model = Model(writes(code))
    before, values = contents(model), [each.clone() for each in model.buffers()]
    outside = dict(KEPT), TOTAL
    with pytest.raises(CaptureError, match=REFUSED[code]) as raised:
        piecework.compile(model, (X,), config=EAGER)
    assert contents(model) == before
    assert all(map(torch.equal, model.buffers(), values))
    assert (dict(KEPT), TOTAL) == outside
    assert raised.value.where == "<string>:3 in write"


@pytest.mark.parametrize(
    "code",
    [
        "self.count.add_(1)",
        "self.count += 1; self.inner.count -= 2",
        "self.cache[1] = x[0]; self.cache[2:4].copy_(x[:2])",
        "self.count = self.count.mul_(2).add_(1)",
        "self.flag, self.number, self.last = True, 1, None; self.items[0] = 1; self.names.add('x'); "
        "self.plain.calls = 0; self.inner = self.inner; self.count.add_(1)",
    ],
    ids=["in place", "by operator", "rows", "what it wrote", "the same again"],
)
def test_tensors_written_in_place_are_the_models_own_in_every_call(code: str) -> None:
    model = Model(writes(code))
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


def test_arguments_and_closures_are_left_as_they_were() -> None:
    def forward(x, options, found):  # type: ignore[no-untyped-def]
        options["y"] = x * 2
        found.append(x)
        return x + 1

    options, found = {"q": X}, []
    with pytest.raises(CaptureError, match=r"its argument options.*in forward"):
        piecework.compile(forward, (X, options, found), config=EAGER)
    assert list(options) == ["q"] and found == []
    count = 0

    def counts(x):  # type: ignore[no-untyped-def]
        nonlocal count
        count += 1
        return x + 1

    with pytest.raises(CaptureError, match=r"own state: .*cell_contents"):
        piecework.compile(counts, (X,), config=EAGER)
    assert count == 0


def test_a_compilation_that_fails_changes_nothing() -> None:
    def forward(self, x):  # type: ignore[no-untyped-def]
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
    def forward(x):  # type: ignore[no-untyped-def]
        x.register_hook(lambda grad: grad)
        return x * 2

    with pytest.raises(CaptureError, match="hook"):
        piecework.compile(forward, (X.clone().requires_grad_(),), config=EAGER)


class Moded(nn.Module):
    """Runs a part of itself in a torch function mode, as transformers' masks are made."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.mode = way, BaseTorchFunctionMode()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.way == "with":
            with BaseTorchFunctionMode():
                return torch.add(x, 1)
        self.mode.__enter__()
        y = torch.add(x, 1)
        if self.way == "left":
            self.mode.__exit__(None, None, None)
        return y


def test_a_mode_that_is_left_again_is_no_change_and_one_that_stays_is_refused() -> None:
    for way in ("with", "left"):
        assert torch.equal(piecework.compile(Moded(way), (X,), config=EAGER)(X[:2]), X[:2] + 1)
    with pytest.raises(CaptureError, match="torch function modes that are entered"):
        piecework.compile(Moded("never"), (X,), config=EAGER)


def test_weights_that_a_first_call_makes() -> None:
    model, x = nn.Sequential(nn.LazyLinear(3), nn.ReLU()), torch.randn(4, 8)
    with pytest.raises(CaptureError, match="no weights before its first call"):
        piecework.compile(model, (x,), config=EAGER)
    expected = model(x)
    torch.testing.assert_close(piecework.compile(model, (x,), config=EAGER)(x), expected)
    model[0].unused = nn.UninitializedParameter()  # never made nor used
    torch.testing.assert_close(piecework.compile(model, (x,), config=EAGER)(x), expected)


class Window(nn.Module):
    """As windowed attention does: a window that is too large is made smaller, once."""

    def __init__(self) -> None:
        super().__init__()
        self.window = 9

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.window > 3:
            self.window = 3
        return x.unfold(1, self.window, 1).sum(2)


def test_attributes_that_a_first_call_sets() -> None:
    model = Window()
    with pytest.raises(CaptureError, match=r"own state: window.*call the model once"):
        piecework.compile(model, (X,), config=EAGER)
    assert model.window == 9
    expected = model(X)
    assert torch.equal(piecework.compile(model, (X,), config=EAGER)(X), expected)
