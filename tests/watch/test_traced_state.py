"""Everything that the trace read of Python is compared: each kind of state and of argument, changed in each way that is known to hide."""

from __future__ import annotations

import types

import pytest
import torch
from models import EAGER
from python_state_cases import Case, Run, model_source
from torch import nn

import piecework
from piecework.errors import BindError, InputError
from piecework.runtime import torch_compat
from piecework.runtime.watch.dict_watch import DictWatch, Look

# What a model holds and what its forward reads of that, and below what changes it, and puts it back.
STATE = """
self.a = None -> x = x if self.a is None else self.a(x)
  m.a = nn.Linear(4, 4)
pass -> x = x * getattr(self, 'extra', 2.0)
  m.extra = 5.0
pass -> x = x * 2 if hasattr(self, 'extra') else x
  m.extra = None
self.l = nn.ModuleList([nn.Linear(4, 4)]) -> for each in self.l: x = each(x)
  m.l.append(nn.Linear(4, 4))
self.i = [1.0, [2.0, {'k': [3.0]}]] -> x = x * self.i[0] * self.i[1][0] * self.i[1][1]['k'][0]
  m.i[0] = 5.0
  m.i[1][1]['k'][0] = 5.0
self.p = (1.0, (2.0, [3.0])) -> x = x * self.p[1][0] * self.p[1][1][0]
  m.p = (1.0, (5.0, [3.0]))
self.d = {'a': 2.0, 'b': 3.0} -> for k, v in self.d.items(): x = x * v + len(k)
  m.d.update(a=5.0)
  m.d.update(c=5.0)
self.m = {1, 2} -> x = x * 2 if 2 in self.m else x
  m.m.discard(2)
self.e = Level.LOW -> x = x * 2 if self.e is Level.LOW else x
  m.e = Level.HIGH
self.e, self.m = Level.LOW, {1, Level.LOW} -> x = x * self.e.value if 1 in self.m else x
  m.e = Level.HIGH
pass -> x = x * self.block.rate * Plain.common
  Block.rate = 5.0 <> Block.rate = 2.0
  Plain.common = 5.0
self.o = Slotted() -> x = x * self.o.rate
  m.o.rate = 5.0
self.o = types.SimpleNamespace(rate=2.0) -> x = x * self.o.rate
  m.o.rate = 5.0
self.o = Computing(rate=2.0) -> x = x * self.o.rate
  m.o.held.update(rate=5.0)
self.o = Aliased() -> x = x * self.o.speed
  m.o.rate = 5.0
self.f = closing(3.0) -> x = self.f(x)
  m.f.held[0] = 5.0
  m.f.change(5.0)
global RATE, TABLE; RATE, TABLE = 2.0, {'rate': 2.0} -> x = helper(x * RATE * TABLE['rate'])
  globals().update(RATE=5.0)
  TABLE.update(rate=5.0) <> TABLE.update(rate=2.0)
  helper.__defaults__ = (5.0,) <> helper.__defaults__ = (2.0,)
  helper.__code__ = (lambda x, by=2.0, *, plus=0.5: x * 21.0).__code__
self.register_buffer('t', torch.ones(5)) -> x = x * self.t.shape[0]
  m.register_buffer('t', torch.ones(7))
self.t = nn.Parameter(torch.ones(4)) -> x = x * self.t * (5 if isinstance(self.t, nn.Parameter) else 3)
  del m.t; m.t = torch.ones(4)
pass -> x = x * 2 if self.block.linear.weight.requires_grad else x
  m.requires_grad_(False)
pass -> x = x * torch.ones(4)
  torch.set_default_dtype(torch.float64) <> torch.set_default_dtype(torch.float32)
pass -> pass
  m.block.gain = 5.0
  m.block.__class__ = Other
  Model.forward = lambda self, x: x
  Model.__call__ = lambda self, x: x <> del Model.__call__
  was, Block.scaled = Block.scaled, lambda self, x: x * 9 <> Block.scaled = was
  d = Block.scaled.__defaults__; Block.scaled.__defaults__ = (9.0,) <> Block.scaled.__defaults__ = d
  Block.twice = property(lambda self: 9.0)
  m.block.register_forward_hook(lambda *a: a[-1] * 2)
  h = nn.modules.module.register_module_forward_hook(lambda *a: a[-1] * 2) <> h.remove()
"""
HARMLESS = """
self.o = Slotted(); self.p = (1.0, (2.0, [3.0])) -> x = x * self.o.rate * self.p[1][0]
  m.unread = 1
  Block.unread = 1
  was, nn.Module.forward = nn.Module.forward, None <> nn.Module.forward = was
  nn.Module.extra = None <> del nn.Module.extra
  m.p = (1.0, (2.0, [3.0]))
  m.o = Slotted()
  m.requires_grad_(False)
  h = nn.Linear(1, 1).register_forward_hook(print)
"""
# The same of an argument.
ARGUMENTS = """
types.SimpleNamespace(rate=2.5) -> x = x * p.rate
  args['p'].rate = 3.5
Slotted() -> x = x * p.rate
  args['p'].rate = 3.5
{1, 2} -> x = x * 2 if 2 in p else x
  args['p'].discard(2)
closing(2.0) -> x = p(x)
  args['p'].held[0] = 5.0
{'a': 2.0, 'b': 3.0} -> for k, v in p.items(): x = x * v + len(k)
  args['p']['a'] = args['p'].pop('a')
"""
# What a second trace of the same model serves.
TRACED_AGAIN = """
torch.ones(4) -> x = x * p * (2 if p.requires_grad else 3)
  args['p'].requires_grad_()
{'t': torch.ones(4)} -> x = x * p['t'] * (2 if isinstance(p['t'], nn.Parameter) else 3)
  args['p'].update(t=nn.Parameter(torch.ones(4), requires_grad=False))
"""


def rows(text: str) -> list[tuple[str, str, str]]:
    """What is held, what is read and what changes it, for each change."""
    found, held, read = [], "", ""
    for line in text.strip().splitlines():
        if line.startswith(" "):
            found.append((held, read, line.strip()))
        else:
            held, read = line.split(" -> ")
    return found


class Changing(Run):
    """A model that was compiled, and a change of what its trace read."""

    def __init__(self, init: str, read: str, change: str, **args: str) -> None:
        lines = ["self.block = Block()", init], ["self", "x", *args], ["x = self.block(x)", read]
        super().__init__(Case(model_source([], *lines), args, []), 0)
        self.do, _, self.undo = change.partition(" <> ")
        given = (torch.randn(3, 4),), dict(self.space["args"])
        self.stitched = piecework.compile(self.model, *given, config=EAGER)

    def __enter__(self) -> Changing:
        return self

    def __exit__(self, *error: object) -> None:
        exec(self.undo, self.space)
        super().__exit__(*error)

    def change(self) -> None:
        exec(self.do, self.space)

    def served(self) -> torch.Tensor:
        return self.call(self.stitched, self.x)

    def check(self) -> None:
        torch.testing.assert_close(self.served(), self.call(self.model, self.x))


CHANGES = rows(STATE)


@pytest.mark.parametrize(
    ("init", "read", "change", "calls"),
    [*((*each, 3) for each in CHANGES), *((*each, 0) for each in CHANGES[1::4])],
)
def test_a_change_of_what_the_trace_read_is_refused(
    init: str, read: str, change: str, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Changing(init, read, change) as run:
        bound = run.stitched.traces[0].entry.now.weights.accepted()  # which nobody has asked yet
        for _ in range(calls):
            run.check()
        with monkeypatch.context() as patched:  # no guard is asked while nothing is written
            patched.setattr(torch_compat, "failing_guard", lambda *_: pytest.fail("asked"))
            for _ in range(calls):
                run.served()
        run.change()
        for _ in range(12):  # also after what is watched counts as busy or as quiet
            assert not bound.unchanged()
            with pytest.raises(InputError):
                run.served()
        with pytest.raises(BindError):
            run.stitched.rebind()
        if run.undo:
            exec(run.undo, run.space)
            assert bound.unchanged()
            run.check()
            run.change()


@pytest.mark.parametrize(("init", "read", "change"), rows(HARMLESS))
def test_what_the_trace_did_not_read_may_change(init: str, read: str, change: str) -> None:
    with Changing(init, read, change) as run:
        run.change()
        for _ in range(12):
            run.check()


def test_what_took_the_place_of_an_equal_object_is_watched() -> None:
    with Changing("self.o = Slotted()", "x = x * self.o.rate", "m.o = Slotted()") as run:
        for _ in range(3):
            run.change()
            for _ in range(2):
                run.check()
        run.model.o.rate = 5.0
        with pytest.raises(InputError, match="rate"):
            run.served()


# --- arguments ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("argument", "read", "change"), rows(ARGUMENTS) + rows(TRACED_AGAIN))
def test_an_argument_changed_in_place_is_refused_or_traced_again(
    argument: str, read: str, change: str
) -> None:
    with Changing("pass", read, change, p=argument) as run:
        run.check()
        run.change()
        for _ in range(2):
            if change in TRACED_AGAIN:
                run.check()
                continue
            with pytest.raises(InputError, match="argument"):
                run.served()


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
        x = torch.relu(x)
        for name, factor in factors.items():
            x = x * factor + len(name)
        return x

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
