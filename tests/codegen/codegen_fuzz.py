"""Random texts near a proved one, and what running a text does. In: a source and a seed. Out: mutants over Python's whole abstract grammar, and logs.

Nodes are generated from the definitions that Python documents of its own syntax tree, so that nothing is left out by hand.
A text runs in a namespace where everything logs: builtins, paths into modules, values, submodules, constants.
"""

from __future__ import annotations

import ast
import builtins
import copy
import random
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch

# --- Python's abstract grammar ---------------------------------------------------------------------

_FIELD = re.compile(r"(\w+)([?*]?) (\w+)")


def _subclasses(kind: type[ast.AST]) -> list[type[ast.AST]]:
    return [
        each
        for each in kind.__subclasses__()
        if each.__doc__ and each.__doc__.startswith(each.__name__)
    ]


def fields_of(kind: type[ast.AST]) -> list[tuple[str, str, str]]:
    """``(type, quantity, name)`` of each field, from the class's own documentation."""
    inside = (kind.__doc__ or "").partition("(")[2].rpartition(")")[0]
    return [(m[1], m[2], m[3]) for m in _FIELD.finditer(inside)]


NAMES = (
    *(
        "x",
        "weight",
        "submod_1",
        "relu",
        "execution_fn",
        "torch",
        "math",
        "operator",
        "helper",
        "fresh",
        "_",
    ),
    *(
        "print",
        "globals",
        "exec",
        "eval",
        "slice",
        "getattr",
        "setattr",
        "len",
        "type",
        "open",
        "tuple",
    ),
    *(
        "__builtins__",
        "__name__",
        "__loader__",
        "__import__",
        "__vllm_submods__",
        "__vllm_consts__",
        "__doc__",
    ),
    *(
        "__annotations__",
        "__class__",
        "__debug__",
        "__init_subclass__",
        "__getattr__",
        "__build_class__",
    ),
)
CONSTANTS: tuple[object, ...] = (
    0,
    1,
    2,
    -1,
    0.0,
    True,
    None,
    ...,
    "x",
    "docstring",
    b"",
    1j,
    10**30,
)


class Grammar:
    """Generates nodes of any kind."""

    def __init__(self, chance: random.Random, names: Sequence[str]) -> None:
        self.chance = chance
        self.names = [*names, *NAMES]

    def value(self, kind: str, depth: int) -> object:
        chance = self.chance
        if kind == "identifier":
            return chance.choice(self.names)
        if kind == "constant":
            return chance.choice(CONSTANTS)
        if kind == "int":
            return chance.choice((0, 1, -1, 114))
        if kind == "string":
            return chance.choice(("type: ignore", "x", ""))
        base = getattr(ast, kind)
        choices = _subclasses(base) or [base]
        if depth <= 0 and kind == "expr":
            choices = [ast.Name, ast.Constant]
        elif depth <= 0 and kind == "stmt":
            choices = [ast.Pass, ast.Expr]
        return self.node(chance.choice(choices), depth)

    def node(self, kind: type[ast.AST], depth: int) -> ast.AST:
        made = kind()
        for of, quantity, name in fields_of(kind):
            setattr(made, name, self.field(of, quantity, depth - 1))
        return made

    def field(self, of: str, quantity: str, depth: int) -> object:
        if quantity == "?":
            return self.value(of, depth) if self.chance.random() < 0.5 else None
        if quantity == "*":
            return [self.value(of, depth) for _ in range(self.chance.choice((0, 1, 1, 2)))]
        return self.value(of, depth)


# --- mutants ---------------------------------------------------------------------------------------


def mutants(code: str, chance: random.Random) -> Iterator[str]:
    """Texts near ``code`` that are other programs, without end; not all of them are Python."""
    original = ast.parse(code)
    plain = ast.dump(original)
    names = sorted({n.id for n in ast.walk(original) if isinstance(n, ast.Name)})
    grammar = Grammar(chance, names)
    while True:
        if chance.random() < 0.3:
            text = _other_text(code, chance)
        else:
            tree = copy.deepcopy(original)
            for _ in range(chance.choice((1, 1, 1, 2))):
                _mutate(tree, grammar, chance)
            try:
                text = ast.unparse(ast.fix_missing_locations(tree))
            except Exception:  # noqa: BLE001 - a tree that no text has
                continue
        if _dumped(text) != plain:
            yield text


def _dumped(text: str) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        try:
            return ast.dump(ast.parse(text))
        except (SyntaxError, ValueError):
            return ""


def _mutate(tree: ast.Module, grammar: Grammar, chance: random.Random) -> None:
    """Change one field of one node: to something generated, something from elsewhere in the tree, or around itself. Or a name, or a lifetime."""
    nodes = list(ast.walk(tree))
    what = chance.random()
    if what < 0.12:
        _rename(nodes, grammar)
        return
    if what < 0.2:  # a lifetime that ends elsewhere, or never
        bodies = [n.body for n in nodes if isinstance(n, (ast.FunctionDef, ast.Try))]
        body = chance.choice(bodies)
        deletes = [stmt for stmt in body if isinstance(stmt, ast.Delete)]
        if deletes and len(body) > 1:
            moved = chance.choice(deletes)
            body.remove(moved)
            if chance.random() < 0.5:
                body.insert(chance.randrange(len(body)), moved)
        return
    owner = chance.choice(nodes)
    fields = fields_of(type(owner))
    if not fields:
        return
    of, quantity, name = chance.choice(fields)
    old = getattr(owner, name, None)
    if quantity == "*":
        items = old if isinstance(old, list) else []
        at = chance.randrange(len(items) + 1)
        what = chance.random()
        if what < 0.2 and items:
            del items[min(at, len(items) - 1)]
        elif what < 0.4 and items:
            items[min(at, len(items) - 1)] = _new(
                of, items[min(at, len(items) - 1)], nodes, grammar
            )
        else:
            items.insert(at, _new(of, None, nodes, grammar))
        setattr(owner, name, items)
    else:
        setattr(owner, name, _new(of, old, nodes, grammar))


def _rename(nodes: Sequence[ast.AST], grammar: Grammar) -> None:
    """One name becomes another one wherever it stands, which may be taken, or mean something to Python."""
    old, new = grammar.chance.choice(grammar.names), grammar.chance.choice(grammar.names)
    for node in nodes:
        for field in ("id", "arg", "name"):
            if getattr(node, field, None) == old and not isinstance(node, (ast.keyword, ast.alias)):
                setattr(node, field, new)


def _new(of: str, old: object, nodes: Sequence[ast.AST], grammar: Grammar) -> object:
    chance = grammar.chance
    kinds = getattr(ast, of, None)
    if kinds is not None and chance.random() < 0.3:
        fitting = [node for node in nodes if isinstance(node, kinds)]
        if fitting:
            return copy.deepcopy(chance.choice(fitting))
    made = grammar.value(of, chance.choice((0, 1, 2, 3)))
    if isinstance(made, ast.AST) and isinstance(old, ast.AST) and chance.random() < 0.5:
        for inner in ast.walk(made):  # what was there goes on inside of what is new
            for of_inner, quantity, name in fields_of(type(inner)):
                if of_inner == of and quantity == "":
                    setattr(inner, name, copy.deepcopy(old))
                    return made
    return made


_PIECES = (
    *(" ", "\n", "    ", "\t", "\f", "\\\n", ";", ":", ",", "(", ")", "[", "]", "*", "**", "@", "->", "=", ":=", "#", "'", '"""'),
    *("print()", "globals().update(x=1)", ": print()", " -> print()", "=print()", "async ", "await ", "yield ", "lambda: ", "f'{print()}'"),
    *("# type: ignore", "@print\n", "[T: print()]", "global torch\n", "del torch\n", "pass\n", "return\n", "import os\n", "not ", "\x00", "é"),
    *("'docstring'\n", "try:\n    pass\nfinally:\n    print()\n", "__builtins__ = math\n", "__name__ = 'x'\n", "class torch: pass\n", "type X = print()\n"),
)  # fmt: skip


def _other_text(code: str, chance: random.Random) -> str:
    at = chance.randrange(len(code))
    what = chance.random()
    if what < 0.2:
        return code[:at] + code[at + chance.choice((1, 2, 5)) :]
    if what < 0.4:
        lines = code.splitlines(keepends=True)
        lines.insert(chance.randrange(len(lines)), chance.choice(lines))
        return "".join(lines)
    if what < 0.6:  # between two lines, as deep as the next one
        lines = code.splitlines(keepends=True)
        place = chance.randrange(len(lines))
        indent = lines[place][: len(lines[place]) - len(lines[place].lstrip())]
        lines.insert(
            place, indent + chance.choice(_PIECES).replace("\n", f"\n{indent}").rstrip(" ") + "\n"
        )
        return "".join(lines)
    return code[:at] + chance.choice(_PIECES) + code[at:]


# --- running a text --------------------------------------------------------------------------------


class Stop(Exception):
    """Raised by the call that a run is told to fail at."""


class World:
    """Everything that a text can reach, and the log of what it did with it."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.log: list[object] = []
        self.fail_at = fail_at
        self.kept: list[object] = []  # so that no id is used twice
        self.lists: dict[int, int] = {}
        self.calls = 0

    def note(self, *what: object) -> None:
        self.log.append(tuple(map(self.describe, what)))

    def act(self, kind: str, *what: object) -> object:
        self.calls += 1
        self.note(kind, *what)
        if self.calls == self.fail_at:
            raise Stop
        return Value(self, self.calls)

    def describe(self, value: object) -> object:
        if isinstance(value, Value):
            return ("value", object.__getattribute__(value, "_serial"))
        if isinstance(value, Method):
            return ("attribute", self.describe(value.owner), value.name)
        if isinstance(value, Path):
            return ("object", id(object.__getattribute__(value, "_real")))
        if isinstance(value, (list, dict)):
            self.kept.append(value)
            number = self.lists.setdefault(id(value), len(self.lists))
            items = value.items() if isinstance(value, dict) else value
            return (type(value).__name__, number, *map(self.describe, items))
        if type(value) is tuple:
            return ("tuple", *map(self.describe, value))
        if isinstance(value, slice):
            return ("slice", *map(self.describe, (value.start, value.stop, value.step)))
        if isinstance(value, (str, int, float, complex, bytes, type(None), type(...))):
            return (type(value).__name__, repr(value))
        return ("object", id(value))


class Value:
    """A value that logs what is done with it."""

    def __init__(self, world: World, serial: object) -> None:
        object.__setattr__(self, "_world", world)
        object.__setattr__(self, "_serial", serial)

    def __getattribute__(self, name: str) -> object:
        return Method(self, name)

    def __setattr__(self, name: str, value: object) -> None:
        object.__getattribute__(self, "_world").note("setattr", self, name, value)


class Method:
    """An attribute of a value: it is a method if it is called, and is read otherwise."""

    def __init__(self, owner: object, name: str) -> None:
        self.owner, self.name = owner, name

    def __call__(self, *args: object, **kwargs: object) -> object:
        world = object.__getattribute__(self.owner, "_world")
        return world.act("method", self.owner, self.name, args, kwargs)


def _operation(name: str) -> Callable[..., object]:
    def run(self: Value, *args: object) -> object:
        return object.__getattribute__(self, "_world").act(name, self, *args)

    return run


_OPERATIONS = """
add sub mul truediv floordiv mod pow matmul lshift rshift and or xor eq ne lt le gt ge iadd isub
radd rsub rmul rtruediv neg pos invert getitem setitem delitem iter bool len contains call
enter exit index int float str repr hash await aiter aenter aexit
"""
for _name in _OPERATIONS.split():
    setattr(Value, f"__{_name}__", _operation(_name))


class Path:
    """What a dotted path leads to."""

    def __init__(self, world: World, real: object) -> None:
        object.__setattr__(self, "_world", world)
        object.__setattr__(self, "_real", real)

    def __getattribute__(self, name: str) -> object:
        world, real = (object.__getattribute__(self, each) for each in ("_world", "_real"))
        return Path(world, getattr(real, name))

    def __setattr__(self, name: str, value: object) -> None:
        object.__getattribute__(self, "_world").note("setattr", self, name, value)

    def __call__(self, *args: object, **kwargs: object) -> object:
        world = object.__getattribute__(self, "_world")
        found = world.act("call", self, args, kwargs)
        real = object.__getattribute__(self, "_real")
        if real is torch.frexp:
            return (found, Value(world, (world.calls, 1)))
        return found


def run(
    code: str, world: World, submods: int, consts: Sequence[object], bound: Sequence[str]
) -> None:
    """Define the module of ``code`` and call its entry; what it does, returns and raises is in the world's log."""
    table: dict[str, object] = {}

    def instrumented(name: str) -> object:
        real = getattr(builtins, name)
        if (
            not callable(real)
            or name in ("slice", "getattr")
            or (isinstance(real, type) and issubclass(real, BaseException))
        ):
            return real

        def call(*args: object, **kwargs: object) -> object:
            world.note("builtin", name)
            return Value(world, name)

        return call

    def load(name: str, *args: object) -> object:
        if name not in sys.modules:
            world.note("import", name)
            return Value(world, name)
        return Path(world, sys.modules[name.partition(".")[0]])

    table = {name: instrumented(name) for name in dir(builtins)} | {"__import__": load}
    before = dict(table)
    held = [Path(world, each) if callable(each) else each for each in consts]
    scope: dict[str, object] = {
        "__builtins__": table,
        "__name__": "fuzzed",
        "__vllm_consts__": held,
    }
    weights = {name: Value(world, name) for name in bound}
    scope |= weights

    def submod(index: int) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            first = world.act("submod", index, args, kwargs)
            return (first, Value(world, (world.calls, 1)))

        return call

    try:
        exec(compile(code, "<fuzzed>", "exec", dont_inherit=True), scope)
        pieces = [submod(index) for index in range(submods)]
        function = scope["execution_fn"]
        result = function(Value(world, "x"), __vllm_submods__=pieces)  # type: ignore[operator]
        world.note("returns", result)
    except Stop:
        world.note("stopped")
    except Exception as error:  # noqa: BLE001 - whatever a text raises belongs to what it does
        world.note("raises", type(error).__name__)
    changed = [name for name in table if table[name] is not before.get(name)]
    world.note("changed builtins", changed)
    held_now = scope.get("__vllm_consts__") is held and scope.get("__builtins__") is table
    world.note("own names", held_now and scope.get("__name__") == "fuzzed")
    world.note("weights", all(scope.get(name) is value for name, value in weights.items()))
    odd = sorted(set(scope) - {"__builtins__", "__name__", "__vllm_consts__"})
    world.note("dunders", [name for name in odd if name.startswith("__")])
