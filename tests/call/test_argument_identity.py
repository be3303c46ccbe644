"""An argument that is a tensor of the model, or shares its memory, is never taken for another."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn

import piecework
from piecework.errors import InputError

WIDTH = 4
X = torch.linspace(0.0, 1.0, 3 * WIDTH).view(3, WIDTH)


def twos() -> torch.Tensor:
    return torch.full((WIDTH,), 2.0)


def asking_model(closed: torch.Tensor) -> nn.Module:
    class Asking(nn.Module):
        of_class = twos()

        def __init__(self) -> None:
            super().__init__()
            self.plain = twos()
            self.items = {"a": [twos()]}
            self.parameter = nn.Parameter(twos())
            self.register_buffer("buffer", twos())

        def forward(self, x: torch.Tensor, given: dict[str, torch.Tensor]) -> torch.Tensor:
            t = given["t"]
            factor = 2.0 if t is self.plain else 3.0
            factor = 5.0 if t is self.items["a"][0] else factor
            factor = 7.0 if t is self.parameter else factor
            factor = 11.0 if t is self.buffer else factor
            factor = 13.0 if t is closed else factor
            factor = 17.0 if t is self.of_class else factor
            return x * factor + t

    return Asking().eval()


def tensors_of(model: nn.Module, closed: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        "other": twos(),
        "parameter of nobody": nn.Parameter(twos()),
        "plain": model.plain,
        "item": model.items["a"][0],
        "parameter": model.parameter,
        "buffer": model.buffer,
        "closure": closed,
        "class": model.of_class,
        "view": model.plain.view(WIDTH),
    }


KINDS = list(tensors_of(asking_model(twos()), twos()))


@pytest.mark.sample(3)
@pytest.mark.parametrize("example", KINDS)
def test_which_tensor_it_is_counts(example: str) -> None:
    closed = twos()
    model = asking_model(closed)
    given = tensors_of(model, closed)
    config = {"backend": "eager", "dynamic_shapes_config": {"max_traces": 8}}
    stitched = piecework.compile(model, (X, {"t": given[example]}), config=config)
    served = set()
    for kind, tensor in given.items():
        try:
            actual = stitched(X, {"t": tensor})
        except InputError:
            continue
        served.add(kind)
        torch.testing.assert_close(actual, model(X, {"t": tensor}), rtol=0, atol=0)
    assert example in served and served >= {"plain", "buffer", "item"}


def test_what_is_no_tensor_is_refused_as_such() -> None:
    model = asking_model(twos())
    stitched = piecework.compile(model, (X, {"t": twos()}), config={"backend": "eager"})
    for given, match in (({"t": None}, "t'] has type NoneType"), ({}, "keys"), (None, "dict")):
        with pytest.raises(InputError, match=match):
            stitched(X, given)


def test_a_tensor_that_takes_the_place_of_a_weight() -> None:
    closed = twos()
    model = asking_model(closed)
    stitched = piecework.compile(model, (X, {"t": twos()}), config={"backend": "eager"})
    before, model.plain = model.plain, twos()
    stitched.rebind()
    for tensor in (before, model.plain, model.plain.view(WIDTH)):
        expected = model(X, {"t": tensor})
        torch.testing.assert_close(stitched(X, {"t": tensor}), expected, rtol=0, atol=0)


def test_a_weight_that_was_replaced_is_let_go() -> None:
    model = asking_model(twos())
    stitched = piecework.compile(model, (X, {"t": twos()}), config={"backend": "eager"})
    stitched(X, {"t": twos()})
    before = weakref.ref(model.buffer)
    model.buffer = twos()
    stitched.rebind()
    gc.collect()
    assert before() is None


class WritesArgument(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(6, WIDTH))
        self.register_buffer("far", torch.zeros(6, WIDTH))

    def forward(self, x: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows.add_(1)
        return x + self.cache[: x.shape[0]] * 2, rows * 2


class WritesWeight(WritesArgument):
    def forward(self, x: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        twice = rows * 2
        self.cache.add_(1)
        return x + self.cache[: x.shape[0]], twice + rows


SHARING: dict[str, Callable[[WritesArgument], torch.Tensor]] = {
    "whole": lambda m: m.cache.view(6, WIDTH),
    "rows": lambda m: m.cache[2:5],
    "turned": lambda m: m.cache.view(WIDTH, 6).t(),
    "flat": lambda m: m.cache.view(-1)[3:15].view(3, WIDTH),
}


@pytest.mark.parametrize("kind", SHARING)
@pytest.mark.parametrize("model_of", [WritesArgument, WritesWeight])
def test_memory_shared_with_a_weight_is_refused_where_one_is_written(
    model_of: type[WritesArgument], kind: str
) -> None:
    model = model_of()
    stitched = piecework.compile(model, (X, torch.zeros(3, WIDTH)), config={"backend": "eager"})
    before = model.cache.clone()
    with pytest.raises(InputError, match=r"rows|size|contiguous") as caught:
        stitched(X, SHARING[kind](model))
    if kind in ("whole", "rows", "flat"):
        assert "shares memory with the model's cache" in str(caught.value)
    assert torch.equal(model.cache, before)
    apart = stitched(X, model.far[:3].clone())
    torch.testing.assert_close(apart[0].shape, X.shape)


def test_a_neighbour_in_memory_is_served() -> None:
    model, twin = WritesArgument(), WritesArgument()
    slab, other = torch.zeros(12, WIDTH), torch.zeros(12, WIDTH)
    model.cache, twin.cache = slab[:6], other[:6]
    stitched = piecework.compile(model, (X, torch.zeros(3, WIDTH)), config={"backend": "eager"})
    for _ in range(2):
        actual, expected = stitched(X, slab[6:]), twin(X, other[6:])
        assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])
    assert torch.equal(slab, other)


def test_a_weight_that_is_only_read_may_be_passed() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(8, WIDTH)

        def forward(self, tokens: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
            return self.embedding(tokens) @ table.t()

    model, tokens = Tied(), torch.arange(5)
    example = (tokens, torch.randn(8, WIDTH))
    stitched = piecework.compile(model, example, config={"backend": "eager"})
    for table in (model.embedding.weight.detach(), model.embedding.weight, torch.randn(8, WIDTH)):
        torch.testing.assert_close(stitched(tokens, table), model(tokens, table))
