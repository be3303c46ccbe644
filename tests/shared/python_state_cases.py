"""Random models with Python state. In: a seed. Out: a `Case`: the text of a model, arguments, and statements that change either between calls.

A case is text, so that one that fails can be read and run again by its seed. It draws every kind of attribute that a model may keep and
every kind of argument that a call may pass; what is done to them is drawn apart from what the forward reads of them.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

PRELUDE = """
import collections, dataclasses, enum, functools, types
import torch
from torch import nn

class Level(enum.Enum):
    LOW = 1
    HIGH = 2

class Rank(enum.IntEnum):
    ONE = 1
    TWO = 2

Pair = collections.namedtuple("Pair", "first second")

@dataclasses.dataclass
class Options:
    rate: object = 2.0
    flag: object = True
    deep: object = None

@dataclasses.dataclass(frozen=True)
class Frozen:
    rate: object = 2.0

@dataclasses.dataclass(slots=True)
class Slotted:
    rate: object = 2.0

class Slots:
    __slots__ = ("rate", "spare")
    def __init__(self, rate):
        self.rate = rate

class Lenient:
    def __init__(self, rate):
        self.rate = rate
    def __eq__(self, other):
        return True
    def __hash__(self):
        return 1

class Plain:
    common = 3.0
    def __init__(self, rate):
        self.rate = rate
    def apply(self, x):
        return x * num(self.rate)
    @property
    def twice(self):
        return num(self.rate) * 2.0

class Computing:
    def __init__(self, **held):
        self.held = held
    def __getattr__(self, name):
        try:
            return self.__dict__["held"][name]
        except KeyError:
            raise AttributeError(name)

class Table(dict):
    pass

class Row(list):
    pass

def num(value):
    if value is None:
        return 0.25
    if value is True:
        return 1.25
    if value is False:
        return 0.75
    if isinstance(value, str):
        return len(value) + (0.5 if value == "a" else 0.0)
    if isinstance(value, Level):
        return 1.5 if value is Level.LOW else 2.5
    if isinstance(value, (tuple, list)):
        total = len(value) + 0.125
        for each in value:
            total = total + num(each)
        return total
    return value

def helper(x, by=2.0, *, plus=0.5):
    return x * num(by) + num(plus)

def closing(rate):
    held = [rate]
    def apply(x):
        return x * num(held[0]) + num(rate)
    def change(value):
        nonlocal rate
        rate = value
    apply.held, apply.change = held, change
    return apply

class Block(nn.Module):
    rate = 2.0
    def __init__(self, size=4):
        super().__init__()
        self.linear = nn.Linear(4, size)
        self.gain = 1.5
    @property
    def twice(self):
        return num(self.gain) * 2.0
    @staticmethod
    def shifted(x):
        return x + 1.0
    def scaled(self, x, by=1.0):
        return x * num(self.rate) * by
    def forward(self, x):
        return self.scaled(self.shifted(self.linear(x))) * self.twice

class Other(Block):
    def scaled(self, x, by=1.0):
        return x * 7.0
"""

_VALUES = (
    "None", "True", "False", "0", "1", "2", "3", "-1", "0.5", "2.0", "1.0", "-0.0", "1e3", '"a"', '"b"', '""',
    "Level.LOW", "Level.HIGH", "Rank.ONE", "(1, 2)", "(1.0, 2)", "(True, (0.5,))", "float('nan')", "float('inf')",
)  # fmt: skip


@dataclass
class Feature:
    """A piece of state or an argument."""

    init: list[str] = field(default_factory=list)  # lines of ``__init__``
    forward: list[str] = field(default_factory=list)  # lines of the forward, on ``x``
    # statements over ``m`` (the model), ``args`` (by name) and the module's names
    changes: list[str] = field(default_factory=list)
    globals: list[str] = field(default_factory=list)  # lines of the module
    # of the forward: name → expressions that make an argument
    parameters: dict[str, str] = field(default_factory=dict)
    # names that are passed without being parameters, by ``**kwargs``
    extra: dict[str, str] = field(default_factory=dict)


@dataclass
class Case:
    """A model, its arguments, and what happens between calls."""

    source: str
    arguments: dict[str, str]
    steps: list[str]

    def __str__(self) -> str:
        return "\n".join(
            [self.source.replace(PRELUDE, ""), f"args = {self.arguments}", *self.steps]
        )


class Draw:
    """Random choices of one case."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def value(self) -> str:
        return self.random.choice(_VALUES)

    def number(self) -> str:
        return self.random.choice(("0.5", "2.0", "3.0", "4", "-1.0", "7"))

    def one(self, *items: str) -> str:
        return self.random.choice(items)

    def some(self, items: list[str], least: int = 1) -> list[str]:
        return self.random.sample(items, self.random.randint(least, len(items)))


Maker = Callable[[Draw, str], Feature]


# --- attributes --------------------------------------------------------------------------------------


def attribute(draw: Draw, n: str) -> Feature:
    init = draw.one(f"self.a{n} = {draw.value()}", "pass")
    read = draw.one(
        f"x = x * num(getattr(self, 'a{n}', {draw.value()}))",
        f"x = x + (1.0 if hasattr(self, 'a{n}') else 2.0)",
        f"x = x if getattr(self, 'a{n}', None) is None else x * num(self.a{n})",
        f"x = x * num(self.__dict__.get('a{n}', 0.5))",
        f"x = x * num(vars(self)['a{n}']) if 'a{n}' in vars(self) else x",
    )
    changes = [
        f"m.a{n} = {draw.value()}",
        f"m.a{n} = {draw.value()}",
        f"vars(m).pop('a{n}', None)",
        f"type(m).a{n} = {draw.value()}",
        f"m.unread{n} = {draw.value()}",
    ]
    return Feature([init], [read], changes)


def class_attribute(draw: Draw, n: str) -> Feature:
    read = draw.one(f"self.block{n}.rate", f"type(self.block{n}).rate", f"Special{n}.rate")
    return Feature(
        [f"self.block{n} = Special{n}()"],
        [f"x = self.block{n}(x) * num({read})"],
        [
            f"m.block{n}.rate = {draw.value()}",
            f"Special{n}.rate = {draw.value()}",
            f"'rate' in vars(Special{n}) and delattr(Special{n}, 'rate')",
            f"Special{n}.unread = {draw.value()}",
            f"m.block{n}.gain = {draw.number()}",
        ],
        [f"class Special{n}(Block):", "    " + draw.one("pass", f"rate = {draw.value()}")],
    )


def methods(draw: Draw, n: str) -> Feature:
    return Feature(
        [f"self.block{n} = Method{n}()"],
        [f"x = self.block{n}(x)"],
        [
            f"Method{n}.scaled = lambda self, x, by=1.0: x * 5.0",
            f"Method{n}.shifted = staticmethod(lambda x: x + 9.0)",
            f"Method{n}.twice = property(lambda self: 3.0)",
            f"Method{n}.forward = lambda self, x: x * 3.0",
            f"m.block{n}.scaled = lambda x: x * 6.0",
            f"m.block{n}.forward = lambda x: x * 8.0",
            f"Method{n}.own.__code__ = (lambda self, x, by=2.0: x * 9.0).__code__",
            f"Method{n}.own.__defaults__ = (7.0,)",
            f"m.block{n}.__class__ = Other",
            f"Method{n}.__call__ = lambda self, x: x * 11.0",
        ],
        [
            f"class Method{n}(Block):",
            "    def own(self, x, by=2.0):",
            "        return x * by",
            "    def forward(self, x):",
            "        return self.own(super().forward(x))",
        ],
    )


def sequence(draw: Draw, n: str) -> Feature:
    kind = draw.one("[{}]", "Row([{}])", "collections.deque([{}])", "({},)")
    items = ", ".join(draw.value() for _ in range(draw.random.randint(1, 3)))
    read = draw.one(
        f"x = x * num(self.s{n}[0])",
        f"for v in self.s{n}: x = x * num(v) + 0.5",
        f"x = x * len(self.s{n})",
        f"x = x * (2.0 if {draw.number()} in self.s{n} else 3.0)",
        f"x = x + (1.0 if self.s{n} else 2.0)",
        f"for i, v in enumerate(self.s{n}): x = x * num(v) + i",
        f"x = x * num(self.s{n}[-1])",
    )
    changes = [
        f"m.s{n}[0] = {draw.value()}",
        f"m.s{n}.append({draw.value()})",
        f"m.s{n}.pop()",
        f"m.s{n}.reverse()",
        f"m.s{n} = {kind.format(draw.value())}",
        f"m.s{n} = {kind.format(items)}",
    ]
    return Feature([f"self.s{n} = {kind.format(items)}"], [read], changes)


def nested(draw: Draw, n: str) -> Feature:
    made = f"[[{draw.value()}], {{'k': [{draw.value()}]}}, ({draw.value()}, [{draw.value()}])]"
    read = draw.one(
        f"self.n{n}[0][0]", f"self.n{n}[1]['k'][0]", f"self.n{n}[2][1][0]", f"self.n{n}[2][0]"
    )
    changes = [
        f"m.n{n}[0][0] = {draw.value()}",
        f"m.n{n}[1]['k'][0] = {draw.value()}",
        f"m.n{n}[1]['k'] = [{draw.value()}]",
        f"m.n{n}[2][1][0] = {draw.value()}",
        f"m.n{n}[2] = ({draw.value()}, [{draw.value()}])",
        f"m.n{n} = {made}",
    ]
    return Feature([f"self.n{n} = {made}"], [f"x = x * num({read})"], changes)


def mapping(draw: Draw, n: str) -> Feature:
    items = ", ".join(f"{k}: {draw.value()}" for k in draw.some(["'p'", "'q'", "1"], 1))
    kind = draw.one(
        "{{{}}}", "Table({{{}}})", "collections.OrderedDict({{{}}})", "collections.defaultdict(float, {{{}}})",
        "types.MappingProxyType({{{}}})",
    )  # fmt: skip
    read = draw.one(
        f"x = x * num(self.d{n}['p']) if 'p' in self.d{n} else x",
        f"x = x * num(self.d{n}.get('q', {draw.value()}))",
        f"for k, v in self.d{n}.items(): x = x * num(v) + num(k)",
        f"for k in self.d{n}: x = x * 2.0 + num(k)",
        f"x = x * len(self.d{n})",
        f"x = x + (1.0 if self.d{n} else 2.0)",
        f"for v in self.d{n}.values(): x = x * num(v) + 0.5",
        f"x = x * (2.0 if 'q' not in self.d{n} else 3.0)",
    )
    changes = [
        f"m.d{n}['p'] = {draw.value()}",
        f"m.d{n}['q'] = {draw.value()}",
        f"m.d{n}.pop('p', None)",
        f"m.d{n}.update({{'z': {draw.value()}}})",
        f"m.d{n}.move_to_end(next(iter(m.d{n})))",
        f"m.d{n} = {kind.format(items)}",
        f"m.d{n} = type(m.d{n})(reversed(list(m.d{n}.items())))",
        f"m.d{n}.clear()",
    ]
    return Feature([f"self.d{n} = {kind.format(items)}"], [read], changes)


def members(draw: Draw, n: str) -> Feature:
    kind = draw.one("{{{}}}", "frozenset({{{}}})")
    items = ", ".join(draw.some(["1", "2", "'a'", "Level.LOW", "0.5"], 1))
    read = draw.one(
        f"x = x * (2.0 if 2 in self.m{n} else 3.0)",
        f"x = x * (2.0 if Level.LOW in self.m{n} else 3.0)",
        f"x = x * len(self.m{n})",
        f"x = x + (1.0 if self.m{n} else 2.0)",
    )
    changes = [
        f"m.m{n}.add({draw.one('2', 'Level.LOW', '9')})",
        f"m.m{n}.discard({draw.one('2', 'Level.LOW', '1')})",
        f"m.m{n}.clear()",
        f"m.m{n} = {kind.format('2, Level.LOW')}",
    ]
    return Feature([f"self.m{n} = {kind.format(items)}"], [read], changes)


def held_object(draw: Draw, n: str) -> Feature:
    kind = draw.one(
        "Options(rate={})", "Frozen({})", "Slotted({})", "Slots({})", "Lenient({})", "Plain({})", "Computing(rate={})",
        "types.SimpleNamespace(rate={})",
    )  # fmt: skip
    lines = [
        f"x = x * num(self.o{n}.rate)",
        f"x = x + (1.0 if hasattr(self.o{n}, 'extra') else 2.0)",
        f"x = x * num(getattr(self.o{n}, 'extra', 0.5))",
    ]
    if kind.startswith("Plain"):
        lines = [
            f"x = self.o{n}.apply(x)",
            f"x = x * self.o{n}.twice",
            f"x = x * self.o{n}.common",
            *lines,
        ]
    changes = [
        f"m.o{n}.rate = {draw.value()}",
        f"object.__setattr__(m.o{n}, 'rate', {draw.value()})",
        f"m.o{n}.extra = {draw.value()}",
        f"m.o{n} = {kind.format(draw.value())}",
        f"m.o{n}.__dict__ = {{'rate': {draw.value()}}}",
        f"m.o{n}.apply = lambda x: x * 12.0",
        f"m.o{n}.common = {draw.number()}",
        f"m.o{n}.held['rate'] = {draw.value()}",
        f"m.o{n}.held['extra'] = {draw.value()}",
        f"del m.o{n}.rate",
        f"type(m.o{n}).apply = lambda self, x: x * 13.0",
        f"type(m.o{n}).extra = {draw.value()}",
    ]
    return Feature([f"self.o{n} = {kind.format(draw.value())}"], draw.some(lines), changes)


def modules(draw: Draw, n: str) -> Feature:
    made = draw.one(
        "nn.ModuleList([Block(), nn.ReLU()])",
        "nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))",
        "nn.ModuleList([nn.Linear(4, 4)])",
    )
    read = draw.one(
        f"for each in self.l{n}: x = each(x)",
        f"x = self.l{n}[0](x)",
        f"x = x * len(self.l{n})",
        f"x = self.l{n}[-1](x)",
        f"for i, each in enumerate(self.l{n}): x = each(x) + i",
    )
    changes = [
        f"m.l{n}.append(nn.Tanh())",
        f"m.l{n}.append(nn.Linear(4, 4))",
        f"m.l{n}[0] = nn.Sigmoid()",
        f"m.l{n}[0] = nn.Linear(4, 4)",
        f"m.l{n}[0].train()",
        f"m.l{n}.train()",
        f"m.l{n}[0].gain = {draw.number()}",
        f"m.l{n}[0].register_forward_hook(lambda *a: a[-1] * 3.0)",
        f"m.l{n}[0].register_forward_pre_hook(lambda m, a: (a[0] * 3.0,))",
        f"m.l{n}[0]._forward_hooks[99] = lambda *a: a[-1] * 4.0",
        f"del m.l{n}[-1]",
        f"m.l{n}[0].weight = nn.Parameter(torch.ones(4, 4))",
        f"m.l{n}[0].weight.data.mul_(2.0)",
        f"m.l{n}[0].__class__ = nn.Identity",
    ]
    return Feature([f"self.l{n} = {made}"], [read], changes)


def named_modules(draw: Draw, n: str) -> Feature:
    read = draw.one(
        f"for k, each in self.c{n}.items(): x = each(x) + len(k)",
        f"x = self.c{n}['one'](x)",
        f"x = self.c{n}['two'](x) if 'two' in self.c{n} else x",
        f"for each in self.c{n}.values(): x = each(x)",
        f"x = x if self.adapter{n} is None else self.adapter{n}(x)",
        f"for k, p in self.c{n}.named_parameters(): x = x + p.sum()",
        "for each in self.children(): x = x * 1.5",
    )
    changes = [
        f"m.c{n}['two'] = nn.Linear(4, 4)",
        f"m.c{n}['one'] = nn.Tanh()",
        f"m.c{n}.pop('one')",
        f"m.adapter{n} = nn.Linear(4, 4)",
        f"m.c{n}['one'].bias = None",
        f"m.extra{n} = nn.Tanh()",
    ]
    init = [f"self.c{n} = nn.ModuleDict({{'one': nn.Linear(4, 4)}})", f"self.adapter{n} = None"]
    return Feature(init, [read], changes)


def tensors(draw: Draw, n: str) -> Feature:
    init = draw.one(
        f"self.register_buffer('t{n}', torch.ones(4))",
        f"self.register_buffer('t{n}', None)",
        f"self.t{n} = nn.Parameter(torch.ones(4))",
        f"self.t{n} = torch.ones(4)",
    )
    lines = [
        f"x = x if self.t{n} is None else x * self.t{n}",
        f"x = x if self.t{n} is None else x * self.t{n}.shape[0]",
        f"x = x * 2.0 if self.t{n} is not None and self.t{n}.requires_grad else x",
        f"x = x * (2.0 if isinstance(self.t{n}, nn.Parameter) else 3.0)",
        f"x = x if self.t{n} is None or self.t{n}.dtype == torch.float64 else x * 5.0",
    ]
    changes = [
        f"m.t{n} = None",
        f"vars(m).pop('t{n}', None); m._buffers.pop('t{n}', None); m._parameters.pop('t{n}', None); m.t{n} = torch.ones(7)",
        f"m.t{n}.requires_grad_({draw.one('True', 'False')})",
        f"m.t{n}.data = torch.ones(4) * 2.0",
        f"m.t{n}.data = torch.ones(7)",
        f"m.t{n}.data = m.t{n}.data.double()",
        f"m._buffers['t{n}'] = torch.full((4,), 3.0)",
    ]
    return Feature([init], draw.some(lines), changes)


def functions(draw: Draw, n: str) -> Feature:
    made = draw.one(
        f"closing({draw.value()})", "torch.relu", f"functools.partial(helper, by={draw.value()})", "helper", "nn.functional.gelu",
        f"Plain({draw.number()}).apply", "{'f': helper}['f']",
    )  # fmt: skip
    changes = [
        f"m.f{n}.held[0] = {draw.value()}",
        f"m.f{n}.change({draw.value()})",
        f"m.f{n} = torch.tanh",
        f"m.f{n}.keywords['by'] = {draw.value()}",
        f"m.f{n}.__self__.rate = {draw.value()}",
        f"m.f{n}.__defaults__ = ({draw.value()},)",
        f"m.f{n}.__kwdefaults__['plus'] = {draw.number()}",
    ]
    return Feature([f"self.f{n} = {made}"], [f"x = self.f{n}(x)"], changes)


def module_globals(draw: Draw, n: str) -> Feature:
    made = draw.one(
        draw.value(), f"[{draw.value()}]", f"{{'g': {draw.value()}}}", f"Plain({draw.value()})"
    )
    read = (
        f"G{n}"
        if made[0] not in "[{P"
        else {"[": f"G{n}[0]", "{": f"G{n}['g']", "P": f"G{n}.rate"}[made[0]]
    )
    lines = [f"x = x * num({read})", f"x = helper{n}(x)", f"x = x * num(Held{n}.rate)"]
    changes = [
        f"globals().update(G{n}={draw.value()})",
        f"G{n}[0] = {draw.value()}",
        f"G{n}['g'] = {draw.value()}",
        f"G{n}.rate = {draw.value()}",
        f"globals().update(helper{n}=lambda x: x * 21.0)",
        f"helper{n}.__defaults__ = ({draw.value()},)",
        f"helper{n}.__kwdefaults__['plus'] = {draw.number()}",
        f"helper{n}.__code__ = (lambda x, by=2.0, *, plus=0.5: x * 22.0).__code__",
        f"Held{n}.rate = {draw.value()}",
        f"globals().update(unread{n}={draw.value()})",
        "torch.set_default_dtype(torch.float64)",
    ]
    return Feature(
        [],
        draw.some(lines),
        changes,
        [
            f"G{n} = {made}",
            f"class Held{n}:",
            f"    rate = {draw.value()}",
            f"def helper{n}(x, by=2.0, *, plus=0.5):",
            "    return x * num(by) + num(plus) + torch.ones(4)",
        ],
    )


# --- arguments ---------------------------------------------------------------------------------------


def argument(draw: Draw, n: str) -> Feature:
    line = draw.one(
        f"x = x * num(p{n})",
        f"x = x if p{n} is None else x * 2.0",
        f"x = x * 2.0 if p{n} else x * 3.0",
        "x = x + 0.0",
    )
    changes = [f"args['p{n}'] = {draw.value()}", f"args['p{n}'] = {draw.value()}"]
    return Feature([], [line], changes, parameters={f"p{n}": draw.value()})


def tensor_argument(draw: Draw, n: str) -> Feature:
    made = draw.one("torch.ones(4)", "None", "nn.Parameter(torch.ones(4))")
    lines = [
        f"x = x if p{n} is None else x * p{n}",
        f"x = x * (2.0 if isinstance(p{n}, nn.Parameter) else 3.0)",
        f"x = x if p{n} is None or not p{n}.requires_grad else x * 5.0",
        f"x = x * (2.0 if p{n} is self.twin{n} else 3.0)",
    ]
    changes = [
        f"args['p{n}'] = None",
        f"args['p{n}'] = torch.ones(4)",
        f"args['p{n}'] = nn.Parameter(torch.ones(4))",
        f"args['p{n}'].requires_grad_()",
        f"args['p{n}'] = m.twin{n}",
        f"args['p{n}'] = {draw.value()}",
    ]
    return Feature(
        [f"self.twin{n} = torch.full((4,), 2.0)"],
        draw.some(lines[: draw.random.randint(1, 4)]),
        changes,
        parameters={f"p{n}": made},
    )


def container_argument(draw: Draw, n: str) -> Feature:
    one, two = draw.value(), draw.one("torch.ones(4)", draw.value())
    made, first, lines = draw.random.choice(
        [
            (f"[{one}, {two}]", "[0]", [f"for v in p{n}: x = x * (v if isinstance(v, torch.Tensor) else num(v))"]),
            (f"({one}, {two})", "[0]", [f"x = x * len(p{n})"]),
            (f"{{'u': {one}, 'v': {two}}}", "['u']", [f"for k in p{n}: x = x * 2.0 + num(k)"]),
            (f"{{'v': {two}, 'u': {one}}}", "['u']", [f"x = x if 'w' in p{n} else x * 3.0"]),
            (f"Pair({one}, {two})", ".first", []),
            (f"collections.OrderedDict(u={one}, v={two})", "['u']", [f"for k in p{n}: x = x * 2.0 + num(k)"]),
            (f"Table(u={one})", "['u']", [f"x = x * len(p{n})"]),
            (f"Row([{one}])", "[0]", [f"x = x * len(p{n})"]),
            (f"collections.deque([{one}])", "[0]", []),
            (f"collections.defaultdict(float, u={one})", "['u']", []),
        ]
    )  # fmt: skip
    read = [f"x = x * num(p{n}{first})", *lines]
    key = first if first.startswith("[") else "[0]"
    changes = [
        f"args['p{n}']{key} = {draw.value()}",
        f"args['p{n}'].append({draw.value()})",
        f"args['p{n}'].update(w={draw.value()})",
        f"args['p{n}'] = type(args['p{n}'])(reversed(args['p{n}'].items()))",
        f"args['p{n}'] = args['p{n}']._replace(first={draw.value()})",
        f"args['p{n}'] = {made}",
        f"args['p{n}'].move_to_end('u')",
        f"args['p{n}'] = dict(args['p{n}'])",
        f"args['p{n}'] = list(args['p{n}'])",
    ]
    return Feature([], draw.some(read), changes, parameters={f"p{n}": made})


def object_argument(draw: Draw, n: str) -> Feature:
    kind = draw.one(
        "Options(rate={})", "Frozen({})", "Slotted({})", "Slots({})", "Lenient({})", "Plain({})", "Computing(rate={})",
        "types.SimpleNamespace(rate={})", "{{1, {}}}", "frozenset({{1, {}}})", "closing({})",
    )  # fmt: skip
    if kind[0] in "{f":
        lines = [f"x = x * (2.0 if 2 in p{n} else 3.0)", f"x = x * len(p{n})"]
    elif kind.startswith("closing"):
        lines = [f"x = p{n}(x)"]
    else:
        lines = [
            f"x = x * num(p{n}.rate)",
            f"x = x * num(getattr(p{n}, 'extra', 0.5))",
            f"x = x * 2.0 if isinstance(p{n}, Plain) else x",
        ]
    changes = [
        f"args['p{n}'].rate = {draw.value()}",
        f"object.__setattr__(args['p{n}'], 'rate', {draw.value()})",
        f"args['p{n}'].extra = {draw.value()}",
        f"args['p{n}'] = {kind.format(draw.value())}",
        f"args['p{n}'].add(2)",
        f"args['p{n}'].clear()",
        f"args['p{n}'].held[0] = {draw.value()}",
        f"args['p{n}'].change({draw.value()})",
        f"args['p{n}'].held['rate'] = {draw.value()}",
        f"type(args['p{n}']).extra = {draw.value()}",
    ]
    return Feature([], draw.some(lines), changes, parameters={f"p{n}": kind.format(draw.value())})


def keywords(draw: Draw, n: str) -> Feature:
    line = draw.one(
        "for k, v in kwargs.items(): x = x * num(v) + len(k)",
        f"x = x * num(kwargs.get('k{n}', 0.5))",
        "x = x * len(kwargs)",
        f"x = x * (2.0 if 'k{n}' in kwargs else 3.0)",
    )
    changes = [
        f"args['k{n}'] = {draw.value()}",
        f"args.pop('k{n}', None)",
        f"args['j{n}'] = args.pop('j{n}', 0.5)",
        f"args['k{n}'] = args.pop('k{n}', 0.5)",
    ]
    return Feature([], [line], changes, extra={f"k{n}": draw.value(), f"j{n}": draw.value()})


ATTRIBUTES: tuple[Maker, ...] = (
    attribute, class_attribute, methods, sequence, nested, mapping, members, held_object, modules, named_modules, tensors,
    functions, module_globals,
)  # fmt: skip
ARGUMENTS: tuple[Maker, ...] = (
    argument,
    tensor_argument,
    container_argument,
    object_argument,
    keywords,
)


def make_case(seed: int) -> Case:
    """The case of a seed."""
    draw = Draw(seed)
    makers = [draw.random.choice(ATTRIBUTES) for _ in range(draw.random.randint(0, 2))]
    makers += [draw.random.choice(ARGUMENTS) for _ in range(draw.random.randint(0, 2))]
    features = [make(draw, str(n)) for n, make in enumerate(makers or [attribute])]
    parameters = {k: v for feature in features for k, v in feature.parameters.items()}
    extra = {k: v for feature in features for k, v in feature.extra.items()}
    signature = ", ".join(["self", "x", *parameters, *(["**kwargs"] if extra else [])])
    forward = [line for feature in features for line in feature.forward]
    draw.random.shuffle(forward)
    lines = [line for feature in features for line in feature.globals]
    lines += ["class Model(nn.Module):", "    def __init__(self):", "        super().__init__()"]
    lines += ["        self.first = nn.Linear(4, 4)"]
    lines += [f"        {line}" for feature in features for line in feature.init]
    lines += [f"    def forward({signature}):", "        x = self.first(x)"]
    lines += [f"        {line}" for line in forward] + ["        return x"]
    changes = [line for feature in features for line in feature.changes]
    steps = [draw.random.choice(changes) for _ in range(draw.random.randint(1, 4))]
    return Case(PRELUDE + "\n".join(lines), {**parameters, **extra}, steps)
