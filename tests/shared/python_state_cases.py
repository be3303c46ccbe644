"""Random models with Python state, as texts: a model, its arguments, and statements that change either between calls.

A case that fails can be read and run again by its seed. What is done to the attributes and arguments of a
case is drawn apart from what the forward reads of them.
"""

from __future__ import annotations

import random
import re
import sys
import types
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

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
class Aliased:
    names = {"speed": "rate"}
    def __init__(self):
        self.rate = 2.0
    def __getattribute__(self, name):
        return super().__getattribute__(super().__getattribute__("names").get(name, name))
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
    if isinstance(value, dict):
        return num(list(value.values()))
    if isinstance(value, Plain):
        return num(value.rate)
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
_NUMBERS = ("0.5", "2.0", "3.0", "4", "-1.0", "7")

# What a model may keep and what is done to it, ``m``. Of each kind one ``init`` runs in ``__init__``, one or two ``read``
# in the forward; ``top`` stands in the module. @ is a number of the feature's own, ? a value, # a number, $ one ``kind``.
# Alternatives are parted by |.
ATTRIBUTES = """
attribute
 init self.a@ = ? | pass
 read x = x * num(getattr(self, 'a@', ?)) | x = x + (1.0 if hasattr(self, 'a@') else 2.0)
 read x = x if getattr(self, 'a@', None) is None else x * num(self.a@) | x = x * num(self.__dict__.get('a@', 0.5))
 read x = x * num(vars(self)['a@']) if 'a@' in vars(self) else x
 then m.a@ = ? | vars(m).pop('a@', None) | type(m).a@ = ? | m.unread@ = ?
attribute of a class
 top class Special@(Block):
 top     gain, rate = 1.5, ?
 init self.block@ = Special@()
 read x = self.block@(x) * num(self.block@.rate) | x = self.block@(x) * num(type(self.block@).rate)
 read x = self.block@(x) * num(Special@.rate)
 then m.block@.rate = ? | Special@.rate = ? | 'rate' in vars(Special@) and delattr(Special@, 'rate')
 then Special@.unread = ? | m.block@.gain = #
method
 top class Method@(Block):
 top     def own(self, x, by=2.0):
 top         return x * by
 top     def forward(self, x):
 top         return self.own(super().forward(x))
 init self.block@ = Method@()
 read x = self.block@(x)
 then Method@.scaled = lambda self, x, by=1.0: x * 5.0 | Method@.shifted = staticmethod(lambda x: x + 9.0)
 then Method@.twice = property(lambda self: 3.0) | Method@.forward = lambda self, x: x * 3.0
 then m.block@.scaled = lambda x: x * 6.0 | m.block@.forward = lambda x: x * 8.0
 then Method@.own.__code__ = (lambda self, x, by=2.0: x * 9.0).__code__ | Method@.own.__defaults__ = (7.0,)
 then m.block@.__class__ = Other | Method@.__call__ = lambda self, x: x * 11.0
sequence
 kind [?] | [?, ?, ?] | Row([?, ?]) | collections.deque([?, ?]) | (?, ?)
 init self.s@ = $
 read x = x * num(self.s@[0]) | for v in self.s@: x = x * num(v) + 0.5 | x = x * len(self.s@)
 read x = x * (2.0 if # in self.s@ else 3.0) | x = x + (1.0 if self.s@ else 2.0)
 read for i, v in enumerate(self.s@): x = x * num(v) + i | x = x * num(self.s@[-1])
 then m.s@[0] = ? | m.s@.append(?) | m.s@.pop() | m.s@.reverse() | m.s@ = $
nested
 kind [[?], {'k': [?]}, (?, [?])]
 init self.n@ = $
 read x = x * num(self.n@[0][0]) | x = x * num(self.n@[1]['k'][0]) | x = x * num(self.n@[2][1][0])
 read x = x * num(self.n@[2][0])
 then m.n@[0][0] = ? | m.n@[1]['k'][0] = ? | m.n@[1]['k'] = [?] | m.n@[2][1][0] = ? | m.n@[2] = (?, [?]) | m.n@ = $
mapping
 kind {'p': ?} | {'q': ?, 1: ?, 'p': ?} | Table({'p': ?, 'q': ?}) | collections.OrderedDict({'q': ?, 'p': ?})
 kind collections.defaultdict(float, {'q': ?}) | types.MappingProxyType({'p': ?, 1: ?})
 init self.d@ = $
 read x = x * num(self.d@['p']) if 'p' in self.d@ else x | x = x * num(self.d@.get('q', ?))
 read for k, v in self.d@.items(): x = x * num(v) + num(k) | for k in self.d@: x = x * 2.0 + num(k)
 read x = x * len(self.d@) | x = x + (1.0 if self.d@ else 2.0) | for v in self.d@.values(): x = x * num(v) + 0.5
 read x = x * (2.0 if 'q' not in self.d@ else 3.0)
 then m.d@['p'] = ? | m.d@['q'] = ? | m.d@.pop('p', None) | m.d@.update({'z': ?}) | m.d@.move_to_end(next(iter(m.d@)))
 then m.d@ = $ | m.d@ = type(m.d@)(reversed(list(m.d@.items()))) | m.d@.clear()
members
 kind {1, 2} | {2, 'a', Level.LOW} | frozenset({1, Level.LOW}) | frozenset({2, 0.5})
 init self.m@ = $
 read x = x * (2.0 if 2 in self.m@ else 3.0) | x = x * (2.0 if Level.LOW in self.m@ else 3.0) | x = x * len(self.m@)
 read x = x + (1.0 if self.m@ else 2.0)
 then m.m@.add(2) | m.m@.add(Level.LOW) | m.m@.discard(2) | m.m@.discard(1) | m.m@.clear() | m.m@ = $
object
 kind Options(rate=?) | Frozen(?) | Slotted(?) | Slots(?) | Lenient(?) | Plain(?) | Computing(rate=?)
 kind types.SimpleNamespace(rate=?)
 init self.o@ = $
 read x = x * num(self.o@.rate) | x = x + (1.0 if hasattr(self.o@, 'extra') else 2.0)
 read x = x * num(getattr(self.o@, 'extra', 0.5)) | x = self.o@.apply(x) if isinstance(self.o@, Plain) else x
 read x = x * (self.o@.twice + self.o@.common) if isinstance(self.o@, Plain) else x
 then m.o@.rate = ? | object.__setattr__(m.o@, 'rate', ?) | m.o@.extra = ? | m.o@ = $ | m.o@.__dict__ = {'rate': ?}
 then m.o@.apply = lambda x: x * 12.0 | m.o@.common = # | m.o@.held['rate'] = ? | m.o@.held['extra'] = ?
 then del m.o@.rate | type(m.o@).apply = lambda self, x: x * 13.0 | type(m.o@).extra = ?
modules
 init self.l@ = nn.ModuleList([Block(), nn.ReLU()]) | self.l@ = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
 init self.l@ = nn.ModuleList([nn.Linear(4, 4)])
 read for each in self.l@: x = each(x) | x = self.l@[0](x) | x = x * len(self.l@) | x = self.l@[-1](x)
 read for i, each in enumerate(self.l@): x = each(x) + i
 then m.l@.append(nn.Tanh()) | m.l@.append(nn.Linear(4, 4)) | m.l@[0] = nn.Sigmoid() | m.l@[0] = nn.Linear(4, 4)
 then m.l@[0].train() | m.l@.train() | m.l@[0].gain = # | m.l@[0].register_forward_hook(lambda *a: a[-1] * 3.0)
 then m.l@[0].register_forward_pre_hook(lambda m, a: (a[0] * 3.0,))
 then m.l@[0]._forward_hooks[99] = lambda *a: a[-1] * 4.0 | del m.l@[-1]
 then m.l@[0].weight = nn.Parameter(torch.ones(4, 4)) | m.l@[0].weight.data.mul_(2.0)
 then m.l@[0].__class__ = nn.Identity
named modules
 init self.c@ = nn.ModuleDict({'one': nn.Linear(4, 4)}); self.adapter@ = None
 read for k, each in self.c@.items(): x = each(x) + len(k) | x = self.c@['one'](x)
 read x = self.c@['two'](x) if 'two' in self.c@ else x | for each in self.c@.values(): x = each(x)
 read x = x if self.adapter@ is None else self.adapter@(x) | for k, p in self.c@.named_parameters(): x = x + p.sum()
 read for each in self.children(): x = x * 1.5
 then m.c@['two'] = nn.Linear(4, 4) | m.c@['one'] = nn.Tanh() | m.c@.pop('one') | m.adapter@ = nn.Linear(4, 4)
 then m.c@['one'].bias = None | m.extra@ = nn.Tanh()
tensor
 init self.register_buffer('t@', torch.ones(4)) | self.register_buffer('t@', None)
 init self.t@ = nn.Parameter(torch.ones(4)) | self.t@ = torch.ones(4)
 read x = x if self.t@ is None else x * self.t@ | x = x if self.t@ is None else x * self.t@.shape[0]
 read x = x * 2.0 if self.t@ is not None and self.t@.requires_grad else x
 read x = x * (2.0 if isinstance(self.t@, nn.Parameter) else 3.0)
 read x = x if self.t@ is None or self.t@.dtype == torch.float64 else x * 5.0
 then m.t@ = None
 then vars(m).pop('t@', None); m._buffers.pop('t@', None); m._parameters.pop('t@', None); m.t@ = torch.ones(7)
 then m.t@.requires_grad_(True) | m.t@.requires_grad_(False) | m.t@.data = torch.ones(4) * 2.0
 then m.t@.data = torch.ones(7) | m.t@.data = m.t@.data.double() | m._buffers['t@'] = torch.full((4,), 3.0)
function
 init self.f@ = closing(?) | self.f@ = torch.relu | self.f@ = functools.partial(helper, by=?) | self.f@ = helper
 init self.f@ = nn.functional.gelu | self.f@ = Plain(#).apply
 read x = self.f@(x)
 then m.f@.held[0] = ? | m.f@.change(?) | m.f@ = torch.tanh | m.f@.keywords['by'] = ? | m.f@.__self__.rate = ?
 then m.f@.__defaults__ = (?,) | m.f@.__kwdefaults__['plus'] = #
global
 kind ? | [?] | {'g': ?} | Plain(?)
 top G@ = $
 top class Held@:
 top     rate = ?
 top def helper@(x, by=2.0, *, plus=0.5):
 top     return x * num(by) + num(plus) + torch.ones(4)
 read x = x * num(G@) | x = helper@(x) | x = x * num(Held@.rate)
 then globals().update(G@=?) | G@[0] = ? | G@['g'] = ? | G@.rate = ? | globals().update(helper@=lambda x: x * 21.0)
 then helper@.__defaults__ = (?,) | helper@.__kwdefaults__['plus'] = #
 then helper@.__code__ = (lambda x, by=2.0, *, plus=0.5: x * 22.0).__code__ | Held@.rate = ?
 then globals().update(unread@=?) | torch.set_default_dtype(torch.float64)
"""
# The same of what a call may pass, as ``p@``, or where it is ``named`` by ``**kwargs``; ``args`` are those of the next one.
ARGUMENTS = """
value
 kind ?
 read x = x * num(p@) | x = x if p@ is None else x * 2.0 | x = x * 2.0 if p@ else x * 3.0 | x = x + 0.0
 then args['p@'] = ?
tensor
 kind torch.ones(4) | None | nn.Parameter(torch.ones(4))
 init self.twin@ = torch.full((4,), 2.0)
 read x = x if p@ is None else x * p@ | x = x * (2.0 if isinstance(p@, nn.Parameter) else 3.0)
 read x = x if p@ is None or not p@.requires_grad else x * 5.0 | x = x * (2.0 if p@ is self.twin@ else 3.0)
 then args['p@'] = $ | args['p@'].requires_grad_() | args['p@'] = m.twin@ | args['p@'] = ?
sequence
 kind [?, ?] | [?, torch.ones(4)] | (?, torch.ones(4)) | Pair(?, ?) | Row([?]) | collections.deque([?])
 read x = x * num(p@[0]) | x = x * len(p@) | for v in p@: x = x * (v if isinstance(v, torch.Tensor) else num(v))
 read x = x * num(p@.first) if isinstance(p@, Pair) else x
 then args['p@'][0] = ? | args['p@'].append(?) | args['p@'] = args['p@']._replace(first=?) | args['p@'] = $
 then args['p@'] = list(args['p@'])
mapping
 kind {'u': ?, 'v': torch.ones(4)} | {'v': ?, 'u': ?} | collections.OrderedDict(u=?, v=?) | Table(u=?)
 kind collections.defaultdict(float, u=?)
 read x = x * num(p@['u']) | for k in p@: x = x * 2.0 + num(k) | x = x if 'w' in p@ else x * 3.0 | x = x * len(p@)
 then args['p@']['u'] = ? | args['p@'].update(w=?) | args['p@'] = type(args['p@'])(reversed(args['p@'].items()))
 then args['p@'] = $ | args['p@'].move_to_end('u') | args['p@'] = dict(args['p@'])
object
 kind Options(rate=?) | Frozen(?) | Slotted(?) | Slots(?) | Lenient(?) | Plain(?) | Computing(rate=?)
 kind types.SimpleNamespace(rate=?)
 read x = x * num(p@.rate) | x = x * num(getattr(p@, 'extra', 0.5)) | x = x * 2.0 if isinstance(p@, Plain) else x
 then args['p@'].rate = ? | object.__setattr__(args['p@'], 'rate', ?) | args['p@'].extra = ? | args['p@'] = $
 then args['p@'].held['rate'] = ? | type(args['p@']).extra = ?
members
 kind {1, ?} | frozenset({1, ?})
 read x = x * (2.0 if 2 in p@ else 3.0) | x = x * len(p@)
 then args['p@'] = $ | args['p@'].add(2) | args['p@'].clear()
function
 kind closing(?)
 read x = p@(x)
 then args['p@'] = $ | args['p@'].held[0] = ? | args['p@'].change(?)
named
 kind ?
 read for k, v in kwargs.items(): x = x * num(v) + len(k) | x = x * num(kwargs.get('k@', 0.5)) | x = x * len(kwargs)
 read x = x * (2.0 if 'k@' in kwargs else 3.0)
 then args['k@'] = ? | args.pop('k@', None) | args['j@'] = args.pop('j@', 0.5) | args['k@'] = args.pop('k@', 0.5)
"""

Feature = dict[str, list[str]]


def _features(text: str) -> dict[str, Feature]:
    found: dict[str, Feature] = {}
    for line in text.strip().splitlines():
        if not line.startswith(" "):
            feature = found[line] = defaultdict(list)
        else:
            what, _, rest = line[1:].partition(" ")
            feature[what] += [rest] if what == "top" else rest.split(" | ")
    return found


@dataclass
class Case:
    """A model, its arguments, and what happens between calls."""

    source: str
    arguments: dict[str, str]
    steps: list[str]

    def __str__(self) -> str:
        shown = self.source.replace(PRELUDE, "")
        return "\n".join([shown, f"args = {self.arguments}", *self.steps])


def make_case(seed: int) -> Case:
    """The case of a seed."""
    source = random.Random(seed)
    attributes, arguments = _features(ATTRIBUTES), _features(ARGUMENTS)
    chosen = [source.choice([*attributes.items()]) for _ in range(source.randint(0, 2))]
    first = len(chosen)
    chosen += [source.choice([*arguments.items()]) for _ in range(source.randint(0, 2))]
    passed: dict[str, str] = {}
    more: dict[str, str] = {}
    top, init, forward, changes = [], ["self.first = nn.Linear(4, 4)"], [], []
    for number, (name, feature) in enumerate(chosen or [("attribute", attributes["attribute"])]):
        kind = source.choice(feature["kind"] or ["?"])

        def made(text: str, number: int = number, kind: str = kind) -> str:
            signs = {"@": lambda: str(number), "?": lambda: source.choice(_VALUES)}
            signs |= {"#": lambda: source.choice(_NUMBERS)}
            return re.sub("[@?#]", lambda sign: signs[sign[0]](), text.replace("$", kind))

        top += map(made, feature["top"])
        init += map(made, source.sample(feature["init"], min(1, len(feature["init"]))))
        forward += map(made, source.sample(feature["read"], min(2, len(feature["read"]))))
        changes += map(made, feature["then"])
        if name == "named":
            more |= {f"{letter}{number}": made("$") for letter in "kj"}
        elif number >= first and chosen:
            passed[f"p{number}"] = made("$")
    source.shuffle(forward)
    signature = ["self", "x", *passed, *(["**kwargs"] if more else [])]
    text = model_source(top, init, signature, ["x = self.first(x)", *forward])
    steps = [source.choice(changes) for _ in range(source.randint(1, 4))]
    return Case(text, passed | more, steps)


def model_source(top: list[str], init: list[str], signature: list[str], forward: list[str]) -> str:
    """A module with a class ``Model`` of these statements."""
    lines = [
        *top,
        *("class Model(nn.Module):", "    def __init__(self):", "        super().__init__()"),
        *(f"        {line}" for line in init),
        f"    def forward({', '.join(signature)}):",
        *(f"        {line}" for line in (*forward, "return x")),
    ]
    return PRELUDE + "\n".join(lines)


class Run:
    """One case while it runs: its model, and the arguments of the next call."""

    def __init__(self, case: Case, number: int, file: str | None = None) -> None:
        self.module = types.ModuleType(f"python_state_case_{number}")
        self.module.__file__ = file or f"<{self.module.__name__}>"
        # Dynamo finds a module's globals by its name.
        sys.modules[self.module.__name__] = self.module
        self.space = self.module.__dict__
        exec(compile(case.source, self.module.__file__, "exec"), self.space)
        torch.manual_seed(0)
        self.model = self.space["Model"]().eval()
        self.space["m"] = self.model
        self.space["args"] = {k: eval(v, self.space) for k, v in case.arguments.items()}
        self.x = torch.randn(5, 4)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        sys.modules.pop(self.module.__name__, None)
        torch.set_default_dtype(torch.float32)

    def call(self, model: Callable[..., Any], x: torch.Tensor) -> Any:
        with torch.no_grad():
            return model(x, **self.space["args"])

    def result(self, model: Callable[..., Any]) -> Any:
        """What ``model`` gives, or None where it raises."""
        try:
            return self.call(model, self.x)
        except Exception:  # noqa: BLE001
            return None

    def change(self, statement: str) -> bool:
        """Run a statement; False if it can't be done to what the case holds."""
        try:
            exec(statement, self.space)
        except Exception:  # noqa: BLE001
            return False
        return True


def stock_is_stale(case: Case, number: int, count: int) -> bool:
    """Whether stock ``torch.compile`` gives another result than eager after so many steps, too."""
    with Run(case, number) as run:
        torch.compiler.reset()
        stock = torch.compile(run.model, backend="eager", dynamic=True)
        run.call(stock, torch.randn(3, 4))
        for _ in filter(run.change, case.steps[:count]):
            for _ in range(2):
                state = torch.random.get_rng_state()
                actual = run.result(stock)
                torch.random.set_rng_state(state)
                expected = run.result(run.model)
                raises = [each is None for each in (actual, expected)]
                if any(raises) and not all(raises):
                    return True
                if not any(raises) and not alike(actual, expected):
                    return True
    return False


def alike(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    same = torch.allclose(actual, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
    return actual.dtype == expected.dtype and same
