"""What code asks of functions, classes and objects beside calling them: each way to ask, of each thing that can be set. A change is seen, or the model is refused."""

from __future__ import annotations

import abc
import array
import collections
import functools
import itertools
import sys
import types
import typing
from collections.abc import Callable

import pytest
import torch
from models import EAGER

import piecework
from piecework.errors import CaptureError, InputError, PieceworkError

X = torch.arange(6.0).reshape(2, 3)

MODULE = """
import torch

def helper(x: int = 3, *, k: int = 4):
    "What it does."
    return x * 2

helper.note = 1

class Kind:
    "What it is."
    val: int = 3
    def method(self, a: int = 1, *, b=2):
        "What it does."
        return a
    method.note = 1

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.function, self.kind, self.obj = helper, Kind, Kind()
    def own(self, x: int = 3, *, k: int = 4):
        "What it does."
        return x
    own.note = 1
    def forward(self, x):
        return x * 2 if {question} else x - 7
"""


def settable(kind: type) -> dict[str, str]:
    """What an object of a class has that can be set → an expression that makes another."""
    sample: typing.Any = {types.FunctionType: lambda: 0, type: type("Sample", (), {})}[kind]
    found: dict[str, str] = {}
    for name, descriptor in vars(kind).items():
        if isinstance(descriptor, (types.GetSetDescriptorType, types.MemberDescriptorType)):
            was = getattr(sample, name, None)
            if type(was) in (str, tuple, dict, type(None)):
                made = {str: "'other'", tuple: "(9,)", dict: "{'q': 9}"}.get(type(was), "None")
                made = {"__defaults__": "(9,)", "__kwdefaults__": "{'k': 9}"}.get(name, made)
                found[name] = "'other'" if name == "__doc__" else made
    return found


FUNCTIONS = {"helper": "helper", "self.function": "helper", "self.own": "Model.own"} | {
    "self.kind.method": "Kind.method",
    "self.obj.method": "Kind.method",
}
CLASSES = {"Kind": "Kind", "self.kind": "Kind", "type(self.obj)": "Kind", "type(self)": "Model"}
WAYS = (
    "{of}.{name} == WAS",
    "getattr({of}, '{name}', 5) == WAS",
    "vars({of}).get('{name}', 5) == WAS",
    "hasattr({of}, '{name}')",
)
NUMBERS = itertools.count()


def questions() -> list[tuple[str, str, str, str]]:
    """Every thing, every attribute, every way to ask: the thing, where it is set, the attribute, the way."""
    found = []
    for things, kind, own in ((FUNCTIONS, types.FunctionType, "note"), (CLASSES, type, "val")):
        names = {**settable(kind), own: "5", "missing": "5"}
        for (of, at), (name, made), way in itertools.product(things.items(), names.items(), WAYS):
            if name not in ("__bases__", "__dict__", "__mro__"):
                found.append((of, f"{at}.{name} = {made}", name, way))
    return found


def loaded(question: str) -> types.ModuleType:
    module = types.ModuleType(f"asked_of_others_{next(NUMBERS)}")
    sys.modules[module.__name__] = module  # Dynamo finds a module's globals by its name
    source = MODULE.replace("{question}", question)
    exec(compile(source, f"<{module.__name__}>", "exec"), vars(module))
    return module


def settled(of: str, change: str, name: str, way: str) -> str:
    """What became of one question: raises AssertionError for a silent difference."""
    held = loaded("True")
    was = eval(f"getattr({of}, {name!r}, 5)", vars(held), {"self": held.Model()})
    module = loaded(way.format(of=of, name=name))
    vars(module)["WAS"] = was
    try:
        model = module.Model().eval()
        try:
            before = model(X)
        except (KeyError, AttributeError):
            return "no model"
        try:
            stitched = piecework.compile(model, (X,), config=EAGER)
        except PieceworkError:
            return "refused"
        assert torch.equal(stitched(X), before), (of, name, way)
        try:
            exec(change, vars(module))
        except (AttributeError, TypeError):
            return "fixed"
        now = model(X)
        try:
            assert torch.equal(stitched(X), now), (of, change, way)
        except InputError:
            return "refused"
        return "served"
    finally:
        sys.modules.pop(module.__name__, None)
        sys.modules.pop(held.__name__, None)


@pytest.mark.parametrize("part", range(4))
def test_what_functions_and_classes_are_asked_for_is_watched(part: int) -> None:
    counts = collections.Counter(itertools.starmap(settled, questions()[part::17]))
    assert counts["refused"] > 10, counts  # each of these asks for what then changes


@pytest.mark.nightly
def test_what_functions_and_classes_are_asked_for_in_any_way_is_watched() -> None:
    for number, each in enumerate(questions()):
        settled(*each)
        if number % 50 == 49:
            torch.compiler.reset()


def test_the_qualified_name_of_a_function_is_refused_and_that_of_a_class_is_told() -> None:
    model = loaded("self.own.__qualname__ == 'Model.own'").Model()
    with pytest.raises(CaptureError, match="__qualname__"):
        piecework.compile(model, (X,), config=EAGER)
    model = loaded("type(self).__qualname__ == 'Model'").Model()
    assert torch.equal(piecework.compile(model, (X,), config=EAGER)(X), X * 2)


# --- abstract classes ----------------------------------------------------------------------------------


class Base(abc.ABC):  # noqa: B024
    pass


class Derived(Base):
    pass


class Plain:
    pass


@typing.runtime_checkable
class Acts(typing.Protocol):
    def act(self) -> int: ...


@typing.runtime_checkable
class Rated(typing.Protocol):
    rate: float


class Meta(type):
    def __instancecheck__(cls, value: object) -> bool:
        return True


class Decides(metaclass=Meta):
    pass


class Asking(torch.nn.Module):
    def __init__(self, ask: Callable[[object, type], bool], value: object, kind: type) -> None:
        super().__init__()
        self.ask, self.value, self.kind = ask, value, kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if self.ask(self.value, self.kind) else x - 7


ASKS = {
    "instance": lambda value, kind: isinstance(value, kind),
    "one of some": lambda value, kind: isinstance(value, (int, kind)),
    "class": lambda value, kind: issubclass(type(value), kind),
    "made": lambda value, kind: isinstance(type(value)(), kind),
}


@pytest.mark.parametrize("ask", ASKS)
@pytest.mark.parametrize("through", [Base, Derived, collections.abc.Mapping])
def test_a_class_that_is_registered_with_an_abstract_one_is_noticed(
    ask: str, through: abc.ABCMeta
) -> None:
    namesake, kind = type("Fresh", (Plain,), {}), type("Fresh", (Plain,), {})
    Base.register(namesake)
    model = Asking(ASKS[ask], kind(), Base if through is Derived else through)
    stitched = piecework.compile(model, (X,), config=EAGER)
    other = type("Other", (), {})
    collections.abc.Mapping.register(other)
    assert torch.equal(stitched(X), model(X))  # which nobody asked about
    through.register(kind)
    assert torch.equal(model(X), X * 2)
    for _ in range(2):
        with pytest.raises(InputError, match="registered"):
            stitched(X)


@pytest.mark.parametrize("name, value, kind", [("act", len, Acts), ("rate", 2.0, Rated)])
@pytest.mark.parametrize("of_class", [True, False])
def test_what_a_protocol_asks_for_is_watched(
    name: str, value: object, kind: type, of_class: bool
) -> None:
    held = type("Fresh", (Plain,), {})()
    model = Asking(ASKS["instance"], held, kind)
    stitched = piecework.compile(model, (X,), config=EAGER)
    assert torch.equal(stitched(X), X - 7)
    setattr(type(held) if of_class else held, name, value)
    assert torch.equal(model(X), X * 2)
    with pytest.raises(InputError, match="traced"):
        stitched(X)


def test_a_class_that_says_itself_what_its_instances_are_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"Meta\.__instancecheck__"):
        piecework.compile(Asking(ASKS["instance"], Plain(), Decides), (X,), config=EAGER)


# --- texts ---------------------------------------------------------------------------------------------


class Saying(torch.nn.Module):
    def __init__(self, held: object, was: str) -> None:
        super().__init__()
        self.held, self.was = held, was

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if str(self.held) == self.was else x - 7


class Inner:
    def __init__(self) -> None:
        self.deep = [1]

    def __repr__(self) -> str:
        return f"Inner({self.deep[-1]})"


TEXTS: dict[str, tuple[Callable[[], typing.Any], Callable[[typing.Any], object]]] = {
    "user's": (Inner, lambda held: held.deep.append(2)),
    "namespace": (lambda: types.SimpleNamespace(a=Inner()), lambda held: held.a.deep.append(2)),
    "array": (lambda: array.array("d", [1.0]), lambda held: held.append(2.0)),
    "user's dictionary": (lambda: collections.UserDict(a=1), lambda held: held.update(b=2)),
    "chain": (lambda: collections.ChainMap({}, {"a": 1}), lambda held: held.maps[1].clear()),
    "counter": (lambda: collections.Counter("aab"), lambda held: held.update("b")),
    "default": (lambda: collections.defaultdict(int, a=1), lambda held: held["b"]),
    "ordered": (
        lambda: collections.OrderedDict(a=1, b=2),
        lambda held: held.move_to_end("a"),
    ),
    "deque": (lambda: collections.deque([1, 2]), lambda held: held.rotate(1)),
    "bounded deque": (lambda: collections.deque([1, 2], 2), lambda held: held.rotate(1)),
    "partial": (
        lambda: functools.partial(max, 1),
        lambda held: held.__setstate__((max, (2,), {}, None)),
    ),
}


@pytest.mark.parametrize("name", TEXTS)
def test_the_text_of_an_object_is_that_of_now(name: str) -> None:
    make, change = TEXTS[name]
    held = make()
    model = Saying(held, str(held))
    try:
        stitched = piecework.compile(model, (X,), config=EAGER)
    except CaptureError:
        return
    assert torch.equal(stitched(X), X * 2)
    change(held)
    assert torch.equal(model(X), X - 7)
    for _ in range(2):
        with pytest.raises(InputError):
            stitched(X)
