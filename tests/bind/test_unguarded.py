"""What Dynamo leaves without a guard: look-ups that found nothing, the order of dictionaries, proxies, methods of built-in classes, partial functions that change."""

from __future__ import annotations

import collections
import contextlib
import functools
import math
import types

import pytest
import torch
from models import EAGER
from torch import nn

import piecework
from piecework.errors import InputError
from piecework.runtime import torch_compat


class Options:
    pass


class Model(nn.Module):
    """``formula`` of the module and of an input."""

    def __init__(self, **state: object) -> None:
        super().__init__()
        for name, value in state.items():
            setattr(self, name, value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.formula(x)


class OfKey(Model):
    def formula(self, x):
        try:
            return x * self.held["rate"]
        except KeyError:
            return x * 7


class OfAttribute(Model):
    def formula(self, x):
        try:
            return x * self.held.rate
        except AttributeError:
            return x * 7


class OfAnything(Model):
    def formula(self, x):
        try:
            return x * self.held.rate
        except:  # noqa: E722
            return x * 7


class Deeper(Model):
    def rate(self):
        return self.held.rate

    def formula(self, x):
        rate = 7
        with contextlib.suppress(AttributeError):
            rate = self.rate()
        return x * rate


class OfModule(Model):
    def formula(self, x):
        try:
            return self.held["rate"](x)
        except KeyError:
            return x * 7


class Chained(Model):
    def formula(self, x):
        return x * self.held["rate"]


class FirstKey(Model):
    def formula(self, x):
        return x * (2 if [*self.held] == ["a", "b"] else 3)


class FirstOfList(Model):
    def formula(self, x):
        return x * (2 if list(self.held) == ["a", "b"] else 3)


class OrderedSum(Model):
    def formula(self, x):
        return functools.reduce(lambda y, key: y * 2 + self.held[key], self.held, x)


class Method(Model):
    def formula(self, x):
        return self.held(x)


class MethodOf(Model):
    def formula(self, x):
        return self.held["act"](x)


class Said(Model):
    def formula(self, x):
        return x * (2 if str(self.held) == "{'a': 1.0, 'b': 2.0}" else 3)


class Largest(Model):
    def formula(self, x):
        return x * (2 if max(self.held, key=lambda _: 1) == "a" else 3)


class Joined(Model):
    def formula(self, x):
        for each in (self.held | {"c": 5.0}).values():
            x = x * 2 + each
        return x


class OfMetaclass(Model):
    def formula(self, x):
        return x * self.held.rate


class ByMetaclass(Model):
    def formula(self, x):
        return x * self.held["rate"]


class OfKind(Model):
    def formula(self, x):
        return x * (2 if isinstance(self.held, Options) else 3)


class Made(type):
    rate = 2.0

    def __getitem__(cls, name):
        return cls.rate


class MadeBy(metaclass=Made):
    pass


class Derived(Options):
    pass


class Elsewhere:
    pass


def _turn(held: dict[str, object]) -> None:
    held["a"] = held.pop("a")


RELU, TANH = torch.Tensor.relu, torch.Tensor.tanh
BEHIND = {"rate": 2.0}
ITEM = Made.__getitem__
CASES = {
    "key": (OfKey, {}, lambda m: m.held.update(rate=3.0)),
    "key of an ordered one": (
        OfKey,
        collections.OrderedDict(),
        lambda m: m.held.update(rate=3.0),
    ),
    "attribute": (OfAttribute, Options(), lambda m: setattr(m.held, "rate", 3.0)),
    "attribute of a class": (OfAttribute, Options, lambda m: setattr(m.held, "rate", 3.0)),
    "name of a module": (OfAttribute, math, lambda m: setattr(math, "rate", 3.0)),
    "anything": (OfAnything, Options(), lambda m: setattr(m.held, "rate", 3.0)),
    "deeper": (Deeper, Options(), lambda m: setattr(m.held, "rate", 3.0)),
    "module": (OfModule, nn.ModuleDict(), lambda m: m.held.update({"rate": nn.ReLU()})),
    "chain": (
        Chained,
        collections.ChainMap({}, {"rate": 2.0}),
        lambda m: m.held.update(rate=3.0),
    ),
    "first key": (FirstKey, {"a": 1.0, "b": 2.0}, lambda m: _turn(m.held)),
    "first of list": (FirstOfList, {"a": 1.0, "b": 2.0}, lambda m: _turn(m.held)),
    "ordered sum": (OrderedSum, {"a": 1.0, "b": 2.0}, lambda m: _turn(m.held)),
    "as a text": (Said, {"a": 1.0, "b": 2.0}, lambda m: _turn(m.held)),
    "largest": (Largest, {"a": 1.0, "b": 2.0}, lambda m: _turn(m.held)),
    "joined": (
        Joined,
        collections.defaultdict(float, {"a": 1.0, "b": 2.0}),
        lambda m: _turn(m.held),
    ),
    "metaclass": (OfMetaclass, MadeBy, lambda m: setattr(Made, "rate", 3.0)),
    "method of a metaclass": (
        ByMetaclass,
        MadeBy,
        lambda m: setattr(Made, "__getitem__", lambda cls, name: 3.0),
    ),
    "bases": (OfKind, Derived(), lambda m: setattr(Derived, "__bases__", (Elsewhere,))),
    "proxy": (Chained, types.MappingProxyType(BEHIND), lambda m: BEHIND.update(rate=3.0)),
    "method": (Method, RELU, lambda m: setattr(m, "held", TANH)),
    "method in a dictionary": (MethodOf, {"act": RELU}, lambda m: m.held.update(act=TANH)),
    "partial method": (
        Method,
        functools.partial(torch.Tensor.mul, other=2),
        lambda m: setattr(m, "held", functools.partial(torch.Tensor.add, other=2)),
    ),
    "partial": (
        Method,
        functools.partial(torch.mul, other=2),
        lambda m: m.held.__setstate__((torch.mul, (), {"other": 3}, None)),
    ),
}


@pytest.fixture(autouse=True)
def _restored():
    yield
    BEHIND["rate"] = Made.rate = 2.0
    Made.__getitem__, Derived.__bases__ = ITEM, (Options,)
    for each in (math, Options):
        if hasattr(each, "rate"):
            del each.rate


@pytest.mark.parametrize("name", sorted(CASES))
def test_what_dynamo_does_not_guard_is_watched(name: str) -> None:
    kind, held, change = CASES[name]
    model, x = kind(held=held).eval(), torch.tensor([-1.5, 0.5, 2.0])
    stitched = piecework.compile(model, (x,), config=EAGER)
    before = model(x)
    assert torch.equal(stitched(x), before)
    change(model)
    assert not torch.equal(model(x), before)
    for _ in range(2):
        with pytest.raises(InputError, match="traced"):
            stitched(x)


class Looked(Model):
    def formula(self, x):
        return x * self.held["a"]


def test_a_key_that_nobody_asks_for_may_come() -> None:
    model, x = Looked(held={"a": 2.0, "b": 3.0}), torch.randn(3)
    stitched = piecework.compile(model, (x,), config=EAGER)
    _turn(model.held)
    model.held["c"] = 5.0
    assert torch.equal(stitched(x), model(x))


class Named(Model):
    def formula(self, x):
        return x * self.held["a"] + self.held["b"]


def test_the_order_of_items_that_are_read_by_name_counts_for_nothing() -> None:
    model, x = Named(held={"a": 2.0, "b": 3.0}), torch.randn(3)
    stitched = piecework.compile(model, (x,), config=EAGER)
    _turn(model.held)
    assert torch.equal(stitched(x), model(x))


class Parsed(Model):
    def formula(self, x):
        try:
            return x * int(self.held["a"])
        except ValueError:
            return x


def test_code_that_catches_what_values_raise_asks_for_no_key_in_vain() -> None:
    model, x = Parsed(held={"a": "x"}), torch.randn(3)
    stitched = piecework.compile(model, (x,), config=EAGER)
    model.held["c"] = "5"
    assert torch.equal(stitched(x), model(x))


class Twice(nn.Module):
    """The first of a list that may be under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = ["a", "b"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for each in (self.first, self.second):
            x = x * (2 if each[0] == "a" else 3)
        return x


class OneOrTwo(Twice):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + (1 if self.first is self.second else 2)


def test_a_list_under_two_names_may_become_two_equal_ones() -> None:
    model, x = Twice(), torch.randn(3)
    stitched = piecework.compile(model, (x,), config=EAGER)
    model.first, model.second = ["a", "b"], ["a", "b"]
    assert torch.equal(stitched(x), model(x))
    for name in ("first", "second"):
        setattr(model, name, ["c", "b"])
        with pytest.raises(InputError, match="traced"):
            stitched(x)
        setattr(model, name, ["a", "b"])
        assert torch.equal(stitched(x), model(x))


def test_code_that_compares_objects_keeps_them_one() -> None:
    model, x = OneOrTwo(), torch.randn(3)
    stitched = piecework.compile(model, (x,), config=EAGER)
    model.second = ["a", "b"]
    with pytest.raises(InputError, match="one object"):
        stitched(x)


FILLINGS = {
    "update": lambda held: held.update({"a": 1}),
    "update by keywords": lambda held: held.update(a=1),
    "union": lambda held: held.__ior__({"a": 1}),
    "item": lambda held: held.__setitem__("a", 1),
    "default": lambda held: held.setdefault("a", 1),
}


@pytest.mark.parametrize("kind", [dict, collections.OrderedDict])
@pytest.mark.parametrize("name", FILLINGS)
def test_that_an_empty_dictionary_is_filled_is_seen(name: str, kind: type) -> None:
    held = kind()
    unwritten = torch_compat.dict_guard([held, {"b": 2}])
    assert unwritten is not None and unwritten() and unwritten()
    numbers = torch_compat.dict_versions([held])
    FILLINGS[name](held)
    assert not unwritten() and torch_compat.dict_versions([held]) != numbers


class NotAsked:
    @property
    def __class__(self):
        raise AssertionError("asked for its class")


def test_what_lies_beside_a_method_is_not_asked_for_its_class(monkeypatch) -> None:
    module = types.ModuleType("unguarded_beside")
    module.beside, module.turn = NotAsked(), torch.Tensor.neg
    monkeypatch.setitem(globals(), "unguarded_beside", module)
    x = torch.randn(4, 8)
    model = lambda x: unguarded_beside.turn(x)  # noqa: E731, F821
    stitched = piecework.compile(model, (x,), config=EAGER)
    assert torch.equal(stitched(x), -x)
    module.turn = torch.Tensor.abs
    with pytest.raises(InputError, match="turn"):
        stitched(x)
