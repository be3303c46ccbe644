"""Everything that the trace read of Python is compared: each kind of state and of argument, changed in each way that is known to hide."""

from __future__ import annotations

import copy
import dataclasses
import enum
import types
from typing import ClassVar

import pytest
import torch
from models import EAGER
from torch import nn

import piecework
from piecework.errors import BindError, InputError
from piecework.runtime import torch_compat
from piecework.runtime.watch.dict_watch import DictWatch, Look

RATE = 2.0
TABLE = {"rate": 2.0}


class Level(enum.Enum):
    LOW = 1
    HIGH = 2


class Settings:
    rate = 2.0


@dataclasses.dataclass(slots=True)
class Slotted:
    rate: float = 2.0


class Computing:
    def __init__(self, **held: float) -> None:
        self.held = held

    def __getattr__(self, name: str) -> float:
        try:
            return self.__dict__["held"][name]
        except KeyError:
            raise AttributeError(name) from None


class Aliased:
    """Looks its attributes up in its own way, as configurations of transformers do."""

    names: ClassVar = {"speed": "rate"}

    def __init__(self) -> None:
        self.rate = 2.0

    def __getattribute__(self, name: str) -> object:
        return super().__getattribute__(super().__getattribute__("names").get(name, name))


class Block(nn.Linear):
    rate = 3.0

    def __init__(self) -> None:
        super().__init__(3, 3)
        self.gain = 2.0

    @property
    def doubled(self) -> float:
        return self.gain * 2

    def scaled(self, x, by=1.5):
        return x * self.rate * by

    def forward(self, x):
        return self.scaled(super().forward(x)) * self.doubled


class Louder(Block):
    def scaled(self, x, by=1.5):
        return x * 7


def helper(x, by=2.0, *, plus=1.0):
    return x * by + plus


def closing():
    held, rate = [2.0], 3.0

    def apply(x):
        return x * held[0] * rate

    def change(value):
        nonlocal rate
        rate = value

    apply.held, apply.change = held, change
    return apply


def applied(steps, x):
    for step in steps:
        x = step(x)
    return x


def iterated(held, x):
    for key, value in held.items():
        x = x * value + len(key)
    return x


class Model(nn.Module):
    common = 2.0

    def __init__(self, name: str) -> None:
        super().__init__()
        self.block = Block()
        self.read = READS[name]
        self.adapter = None
        self.steps = nn.ModuleList([nn.Linear(3, 3)])
        self.items = [1.0, [2.0, {"k": [3.0]}]]
        self.pair = (1.0, (2.0, [3.0]))
        self.table = {"a": 2.0, "b": 3.0}
        self.members = {1, 2}
        self.level, self.levels = Level.LOW, {1, Level.LOW}
        self.slotted, self.space = Slotted(), types.SimpleNamespace(rate=2.0)
        self.computing = Computing(rate=2.0)
        self.aliased = Aliased()
        self.function = closing()
        self.register_buffer("shape_only", torch.ones(5))

    def forward(self, x):
        return self.read(self, self.block(x))


def put(owner: object, name: str, value: object):
    """Set an attribute of something that outlives the test; returns how to undo it."""
    is_own = not isinstance(owner, type) or name in vars(owner)
    before = getattr(owner, name) if is_own else None
    setattr(owner, name, value)
    return lambda: setattr(owner, name, before) if is_own else delattr(owner, name)


READS = {
    "missing": lambda m, x: x if m.adapter is None else m.adapter(x),
    "default": lambda m, x: x * getattr(m, "extra", 2.0),
    "hasattr": lambda m, x: x * 2 if hasattr(m, "extra") else x,
    "steps": lambda m, x: applied(m.steps, x),
    "items": lambda m, x: x * m.items[0] * m.items[1][0] * m.items[1][1]["k"][0],
    "pair": lambda m, x: x * m.pair[1][0] * m.pair[1][1][0],
    "table": lambda m, x: iterated(m.table, x),
    "members": lambda m, x: x * 2 if 2 in m.members else x,
    "level": lambda m, x: x * 2 if m.level is Level.LOW else x,
    "member's": lambda m, x: x * m.level.value if 1 in m.levels else x,
    "class": lambda m, x: x * m.common * Settings.rate,
    "slotted": lambda m, x: x * m.slotted.rate,
    "space": lambda m, x: x * m.space.rate,
    "computing": lambda m, x: x * m.computing.rate,
    "aliased": lambda m, x: x * m.aliased.speed,
    "function": lambda m, x: m.function(x),
    "globals": lambda m, x: helper(x * RATE * TABLE["rate"]),
    "shape": lambda m, x: x * m.shape_only.shape[0],
    "gradients": lambda m, x: x * 2 if m.block.weight.requires_grad else x,
    "kind": lambda m, x: x * 2 if isinstance(m.shape_only, nn.Parameter) else x,
    "made": lambda m, x: x * torch.ones(3),
    "nothing": lambda m, x: x,
}

CHANGES = {
    "an attribute that was None": ("missing", lambda m: setattr(m, "adapter", nn.Linear(3, 3))),
    "an attribute that was missing": ("default", lambda m: setattr(m, "extra", 5.0)),
    "an attribute that was asked for": ("hasattr", lambda m: setattr(m, "extra", None)),
    "an appended module": ("steps", lambda m: m.steps.append(nn.Linear(3, 3)) and None),
    "an item": ("items", lambda m: m.items.__setitem__(0, 5.0)),
    "an item deep down": ("items", lambda m: m.items[1][1]["k"].__setitem__(0, 5.0)),
    "another tuple": ("pair", lambda m: setattr(m, "pair", (1.0, (5.0, [3.0])))),
    "a value": ("table", lambda m: m.table.update(a=5.0)),
    "a key": ("table", lambda m: m.table.update(c=5.0)),
    "a member": ("members", lambda m: m.members.discard(2)),
    "an enum": ("level", lambda m: setattr(m, "level", Level.HIGH)),
    "an enum that a set holds too": ("member's", lambda m: setattr(m, "level", Level.HIGH)),
    "a class's attribute": ("class", lambda m: put(Model, "common", 5.0)),
    "a slot": ("slotted", lambda m: setattr(m.slotted, "rate", 5.0)),
    "a namespace's": ("space", lambda m: setattr(m.space, "rate", 5.0)),
    "a computed attribute": ("computing", lambda m: m.computing.held.update(rate=5.0)),
    "an attribute that its class looks up": ("aliased", lambda m: setattr(m.aliased, "rate", 5.0)),
    "what a closure holds": ("function", lambda m: m.function.held.__setitem__(0, 5.0)),
    "a closure's variable": ("function", lambda m: m.function.change(5.0)),
    "a global's entry": (
        "globals",
        lambda m: TABLE.update(rate=5.0) or (lambda: TABLE.update(rate=2.0)),
    ),
    "a function's default": ("globals", lambda m: put(helper, "__defaults__", (5.0,))),
    "a function's code": ("globals", lambda m: put(helper, "__code__", other_helper.__code__)),
    "a tensor that only its shape was read of": (
        "shape",
        lambda m: m.register_buffer("shape_only", torch.ones(7)),
    ),
    "whether a weight has gradients": ("gradients", lambda m: m.requires_grad_(False) and None),
    "a number of a submodule": ("nothing", lambda m: setattr(m.block, "gain", 5.0)),
    "a submodule's class": ("nothing", lambda m: setattr(m.block, "__class__", Louder)),
    "its forward": ("nothing", lambda m: put(Model, "forward", lambda self, x: x)),
    "its call": ("nothing", lambda m: put(Model, "__call__", lambda self, x: x)),
    "a method": ("nothing", lambda m: put(Block, "scaled", lambda self, x: x * 9)),
    "a method's default": ("nothing", lambda m: put(Block.scaled, "__defaults__", (9.0,))),
    "a property": ("nothing", lambda m: put(Block, "doubled", property(lambda self: 9.0))),
    "a hook": ("nothing", lambda m: m.block.register_forward_hook(lambda *a: a[-1] * 2) and None),
    "a hook for all modules": (
        "nothing",
        lambda m: nn.modules.module.register_module_forward_hook(lambda *a: a[-1] * 2).remove,
    ),
    "the default dtype": ("made", lambda m: set_dtype(torch.float64)),
}


def other_helper(x, by=2.0, *, plus=1.0):
    return x * 21.0


def set_dtype(dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    return lambda: torch.set_default_dtype(before)


def compiled(model: nn.Module) -> tuple[piecework.StitchedModule, torch.Tensor]:
    return piecework.compile(model, (torch.randn(4, 3),), config=EAGER), torch.randn(5, 3)


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_what_the_trace_read_is_refused(name: str) -> None:
    read, change = CHANGES[name]
    model = Model(read).eval()
    stitched, x = compiled(model)
    for _ in range(3):
        torch.testing.assert_close(stitched(x), model(x).detach())
    undo = change(model)
    try:
        for _ in range(12):  # also after what is watched counts as busy or as quiet
            with pytest.raises(InputError):
                stitched(x)
        with pytest.raises(BindError):
            stitched.rebind()
    finally:
        if callable(undo):
            undo()
    if callable(undo):
        torch.testing.assert_close(stitched(x), model(x).detach())


@pytest.mark.parametrize("name", READS)
def test_calls_ask_no_guard_tree_while_nothing_is_written(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    stitched, x = compiled(Model(name).eval())
    for _ in range(3):
        stitched(x)
    asked = []
    monkeypatch.setattr(torch_compat, "failing_guard", lambda *a: asked.append(a) or "")
    for _ in range(3):
        stitched(x)
    assert not asked


@pytest.mark.parametrize(
    "name",
    [
        *("an attribute that was None", "an item", "a slot", "what a closure holds"),
        *("a function's default", "a method", "a hook"),
    ],
)
def test_a_change_before_the_first_call_is_refused(name: str) -> None:
    read, change = CHANGES[name]
    model = Model(read).eval()
    stitched, x = compiled(model)
    bound = stitched.captured.weights.accepted()  # another one, which nobody has asked yet
    undo = change(model)
    try:
        for _ in range(2):
            assert not bound.unchanged()
            with pytest.raises(InputError):
                stitched(x)
    finally:
        if callable(undo):
            undo()
    if callable(undo):
        assert bound.unchanged()
        torch.testing.assert_close(stitched(x), model(x).detach())


def test_what_took_the_place_of_an_equal_object_is_watched() -> None:
    model = Model("slotted").eval()
    stitched, x = compiled(model)
    for _ in range(3):
        model.slotted = Slotted()
        for _ in range(2):
            torch.testing.assert_close(stitched(x), model(x).detach())
    model.slotted.rate = 5.0
    with pytest.raises(InputError, match="rate"):
        stitched(x)


HARMLESS = {
    "an unread attribute": lambda m: setattr(m, "unread", 1),
    "an unread attribute of a class": lambda m: put(Block, "unread", 1),
    "a method that a subclass has": lambda m: put(nn.Module, "forward", None),
    "a method that a library adds to every module": lambda m: put(nn.Module, "extra", None),
    "an equal value": lambda m: setattr(m, "pair", copy.deepcopy(m.pair)),
    "an equal object": lambda m: setattr(m, "slotted", Slotted()),
    "gradients that nobody asks for": lambda m: m.requires_grad_(False) and None,
    "a hook elsewhere": lambda m: nn.Linear(1, 1).register_forward_hook(print).remove,
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_the_trace_did_not_read_may_change(name: str) -> None:
    model = Model("items").eval()
    model.read = lambda m, x: READS["pair"](m, READS["slotted"](m, x)) * m.items[0]
    stitched, x = compiled(model)
    undo = HARMLESS[name](model)
    for _ in range(12):
        torch.testing.assert_close(stitched(x), model(x).detach())
    if callable(undo):
        undo()


# --- arguments ---------------------------------------------------------------------------------------

ARGUMENTS = {
    "a namespace": (
        lambda: types.SimpleNamespace(rate=2.5),
        lambda a, x: x * a.rate,
        lambda a: setattr(a, "rate", 3.5),
    ),
    "slots": (Slotted, lambda a, x: x * a.rate, lambda a: setattr(a, "rate", 3.5)),
    "a set": (lambda: {1, 2}, lambda a, x: x * 2 if 2 in a else x, lambda a: a.discard(2)),
    "a closure": (closing, lambda a, x: a(x), lambda a: a.held.__setitem__(0, 5.0)),
    "an order": (
        lambda: {"a": 2.0, "b": 3.0},
        lambda a, x: iterated(a, x),
        lambda a: a.update(a=a.pop("a")),
    ),
    "gradients": (
        lambda: torch.ones(3),
        lambda a, x: x * a * (2 if a.requires_grad else 3),
        lambda a: a.requires_grad_(),
    ),
    "a parameter in a dict": (
        lambda: {"t": torch.ones(3)},
        lambda a, x: x * a["t"] * (2 if isinstance(a["t"], nn.Parameter) else 3),
        lambda a: a.update(t=nn.Parameter(torch.ones(3), requires_grad=False)),
    ),
}


#: What a second trace of the same model serves.
TRACED_AGAIN = {"gradients", "a parameter in a dict"}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_argument_changed_in_place_is_refused_or_traced_again(name: str) -> None:
    make, read, change = ARGUMENTS[name]

    class Reading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x, argument):
            return read(argument, self.linear(x))

    model, x, argument = Reading().eval(), torch.randn(5, 3), make()
    stitched = piecework.compile(model, (torch.randn(4, 3), argument), config=EAGER)
    torch.testing.assert_close(stitched(x, argument), model(x, argument).detach())
    change(argument)
    for _ in range(2):
        if name in TRACED_AGAIN:
            torch.testing.assert_close(stitched(x, argument), model(x, argument).detach())
            continue
        with pytest.raises(InputError, match="argument"):
            stitched(x, argument)


def test_an_equal_object_serves_as_well_and_unread_attributes_may_change() -> None:
    def scaled(x, options, /, *, shift=1.0):
        return torch.relu(x) * options.rate + shift

    x, options = torch.randn(5, 3), types.SimpleNamespace(rate=2.5)
    stitched = piecework.compile(scaled, (torch.randn(4, 3), options), {"shift": 2.0}, config=EAGER)
    options.other = 1
    for each in (options, types.SimpleNamespace(rate=2.5)):
        torch.testing.assert_close(stitched(x, each, shift=2.0), scaled(x, each, shift=2.0))
    with pytest.raises(InputError, match=r"options\.rate was 2\.5 when the model was traced"):
        stitched(x, types.SimpleNamespace(rate=3.5), shift=2.0)


def test_the_order_of_keyword_arguments_that_are_gathered_is_compared() -> None:
    def gathered(x, **factors):
        return iterated(factors, torch.relu(x))

    x = torch.randn(5, 3)
    stitched = piecework.compile(
        gathered, (torch.randn(4, 3),), {"a": 2.0, "bb": 3.0}, config=EAGER
    )
    torch.testing.assert_close(stitched(x, a=2.0, bb=3.0), gathered(x, a=2.0, bb=3.0))
    with pytest.raises(InputError, match="in this order"):
        stitched(x, bb=3.0, a=2.0)


def test_a_dictionary_that_is_only_looked_up_may_come_in_any_order() -> None:
    def looked_up(x, held):
        return torch.relu(x) * held["a"] + held["b"]

    x, held = torch.randn(5, 3), {"a": 2.0, "b": 3.0}
    stitched = piecework.compile(looked_up, (torch.randn(4, 3), held), config=EAGER)
    turned = dict(reversed(held.items()))
    torch.testing.assert_close(stitched(x, turned), looked_up(x, turned))


# --- the parts ---------------------------------------------------------------------------------------


QUICK = pytest.mark.skipif(
    torch_compat.dict_guard([{}]) is None, reason="CPython 3.13.0 misses writes: all is compared"
)


@QUICK
def test_a_written_dictionary_class_slot_or_list_is_noticed() -> None:
    class Thing:
        __slots__ = ("__dict__", "slot")

    class Renamed(Thing):
        __slots__ = ()

    def watched():
        thing, held, items = Thing(), {"a": 1}, [1, 2]
        thing.slot = 1
        steps = [
            Look.of(held, "a", "entry"),
            Look.of(thing, "slot", "attribute"),
            Look.of(thing, None, "type"),
            Look.of(items, None, "contents"),
        ]
        return DictWatch(steps), thing, held, items

    changes = (
        lambda thing, held, items: held.update(a=2),
        lambda thing, held, items: setattr(thing, "slot", 2),
        lambda thing, held, items: setattr(thing, "__class__", Renamed),
        lambda thing, held, items: items.append(3),
    )
    for change in changes:
        watch, *objects = watched()
        assert watch.untouched()
        change(*objects)
        assert not watch.untouched()
        assert not watch.compare()
    watch, _, held, _ = watched()
    held["unread"] = 1
    assert not watch.untouched()
    assert watch.compare()


def test_numbers_of_dictionaries_tell_of_attributes_or_are_not_used() -> None:
    thing = types.SimpleNamespace(rate=2.0)
    before = torch_compat.dict_versions([vars(thing)])
    thing.rate = 3.0
    assert before is None or before != torch_compat.dict_versions([vars(thing)])


@QUICK
@pytest.mark.parametrize("count", [1, 128, 129, 1000])
def test_a_write_to_any_of_many_dictionaries_is_noticed(count: int) -> None:
    held = [{"a": 1} for _ in range(count)]
    for index in {0, count // 2, count - 1}:
        watch = DictWatch([Look.of(each, "a", "entry") for each in held])
        assert watch.untouched() and watch.untouched()
        held[index]["a"] = 2
        assert not watch.untouched()
        assert not watch.compare()


def test_dynamo_does_not_time_its_guards(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would empty the processor's caches for that, for a log alone."""
    guards = pytest.importorskip("torch._dynamo.guards")
    timed: list[object] = []
    monkeypatch.setattr(guards, "profile_guard_manager", lambda *given: timed.append(given) or 0.0)
    x = torch.randn(4, 8)
    torch.compile(nn.Linear(8, 8), backend="eager")(x)
    assert len(timed) == 1  # Dynamo by itself does
    model = nn.Linear(8, 8)
    stitched = piecework.compile(model, (x,), config=EAGER)
    assert len(timed) == 1
    torch.testing.assert_close(stitched(x), model(x))
