"""Runs emitted text on tokens: statement by statement, by Python's rules for a straight line. Each call has to be the next one of the graph.

What the text may consist of is what is read here; any other syntax is refused. No operator is called and no submodule; what is imported is the
modules that it names.
"""

from __future__ import annotations

import ast
import builtins
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, NoReturn

import torch.fx

from piecework.codegen.graph.origin import node_where
from piecework.codegen.plan.literals import read_literal
from piecework.codegen.plan.names import CONSTS, SUBMODS
from piecework.codegen.proof.graph_run import Event, GraphRun, Linkage, Objects, Sameness, Token
from piecework.errors import EmitError

_SIGNS: Mapping[type[ast.AST], Callable[..., object]] = {
    **{ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul},
    **{ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod},
    **{ast.Pow: operator.pow, ast.MatMult: operator.matmul, ast.LShift: operator.lshift},
    **{ast.RShift: operator.rshift, ast.BitAnd: operator.and_, ast.BitOr: operator.or_},
    **{ast.BitXor: operator.xor, ast.Eq: operator.eq, ast.NotEq: operator.ne},
    **{ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge},
    **{ast.USub: operator.neg, ast.UAdd: operator.pos, ast.Invert: operator.invert},
    ast.Not: operator.not_,
}
_MAX_CALLS = 60  # functions that call each other
_NOTHING = object()


def parse_text(code: str, what: str = "stitching source") -> ast.Module:
    """``code`` as a syntax tree.

    Raises:
        EmitError: it is not Python, or nested deeper than Python's parser goes.
    """
    try:
        return ast.parse(code)
    except (SyntaxError, ValueError) as error:
        raise EmitError(f"{what} is not Python: {error}") from error
    except (RecursionError, MemoryError) as error:
        raise EmitError(f"{what} is not Python: it is nested too deeply for its parser") from error


def line_at(code: str, line: int) -> str:
    """Where an error is: the number of a line, and its text."""
    lines = code.splitlines()
    return f"line {line}: {lines[line - 1].strip() if 0 < line <= len(lines) else ''}"


@dataclass(frozen=True, slots=True)
class _Submod:
    target: str


@dataclass(slots=True)
class _Frame:
    """One run of a function: its values, the names that it bound, those that it took from outside, and where its statements use names."""

    values: dict[str, object]
    bound: set[str]
    outer: set[str] = field(default_factory=set)
    count: int = 0
    last: dict[str, int] = field(default_factory=dict)
    own: dict[str, ast.stmt] = field(default_factory=dict)
    returned: set[str] = field(default_factory=set)
    deletes: list[tuple[int, str, ast.stmt]] = field(default_factory=list)


class TextRun:
    """Runs a text beside what its graph did.

    Attributes:
        functions: name → definition.
        literals: numbers that module level names.
        statements: how many statements of functions were run.
    """

    def __init__(
        self, code: str, tree: ast.Module, entry: str, graph: GraphRun, linked: Linkage
    ) -> None:
        self.code, self.entry, self.graph, self.direct = code, entry, graph, linked.direct
        self.functions: dict[str, ast.FunctionDef] = {}
        self.literals: dict[str, object] = {}
        self.statements = self.next = 0
        self.same = Sameness().same
        self.objects = Objects()
        self._frames: list[_Frame] = []
        self._ran: dict[str, _Frame] = {}
        self._final: set[int] = set()  # lines in a finally clause
        self._opening = False  # a try follows
        self._imports: set[str] = set()
        self._tables: dict[str, list[Any]] = {CONSTS: list(linked.consts), SUBMODS: [_Submod(f"submod {name}") for name in linked.submod_names]}  # fmt: skip
        self.module: dict[str, object] = {}
        for stmt in tree.body:
            self._module_level(stmt)
        if entry not in self.functions:
            raise EmitError(f"the text defines no function {entry}")

    def run(self, held: Mapping[str, object], tokens: Sequence[object]) -> object:
        """What the entry returns for ``tokens``, with ``held`` at module level."""
        self.module.update(held)
        try:
            return self._called(self.functions[self.entry], tokens)
        except RecursionError as error:
            raise EmitError("the text is nested too deeply") from error

    def finish(self, returned: object) -> None:
        """Check that nothing is left of the graph, and that the results are the same."""
        if self.next < len(self.graph.events):
            node = self.graph.events[self.next].node
            raise EmitError("the text ends before this node", where=node_where(node))
        if not self.same(self.graph.returned, returned):
            last = self.functions[self.entry].body[-1]
            self.refuse(last, "the text returns something else than the graph")

    def refuse(self, at: ast.AST | int, why: str) -> NoReturn:
        line = at if isinstance(at, int) else getattr(at, "lineno", 0)
        raise EmitError(why, where=line_at(self.code, line) if line else None)

    def _no_part(self, at: ast.AST, of: str) -> NoReturn:
        self.refuse(at, f"{type(at).__name__} is not part of emitted {of}")

    # --- module level ----------------------------------------------------------------------------

    def _module_level(self, stmt: ast.stmt) -> None:
        match stmt:
            case ast.Import(names):
                for each in names:
                    root = each.name.partition(".")[0]
                    if each.asname:
                        self.refuse(stmt, "import ... as is not part of emitted modules")
                    try:
                        import_module(each.name)
                        self.module[root] = import_module(root)
                    except ImportError as error:
                        self.refuse(stmt, f"the import fails: {error}")
                    self._imports.add(root)
            case ast.Assign([ast.Name(name)], value):
                self._bind_global(stmt, name)
                literal = read_literal(value)
                if literal is not None:
                    self.literals[name] = self.module[name] = literal.value
                elif self._is_path(value) or self._table_of(value) == CONSTS:
                    self.module[name] = self._value(value)
                else:
                    self._no_part(value, "modules")
            case ast.Assign():
                self.refuse(stmt, "one name is assigned to at module level")
            case ast.FunctionDef():
                self._bind_global(stmt, stmt.name)
                self._check_function(stmt)
                self.functions[stmt.name] = stmt
            case _:
                self._no_part(stmt, "modules")

    def _bind_global(self, at: ast.AST, name: str) -> None:
        if name in self.module or name in self.functions:
            self.refuse(at, f"{name!a} is bound twice at module level")
        self._own_name(at, name)

    def _own_name(self, at: ast.AST, name: str) -> None:
        if name.startswith("__"):
            why = "is a name of Python's or of the emitted module, which no text may bind"
            self.refuse(at, f"{name!a} {why}")

    def _check_function(self, function: ast.FunctionDef) -> None:
        given = function.args
        annotated = [each.annotation for each in ast.walk(given) if isinstance(each, ast.arg)]
        if any((*annotated, function.decorator_list, function.returns, getattr(function, "type_params", []))):  # fmt: skip
            self.refuse(function, "decorators and annotations are not part of emitted modules")
        if given.posonlyargs or [each.arg for each in given.kwonlyargs] not in ([], [SUBMODS]):
            self.refuse(function, f"the only parameter that is not plain is {SUBMODS}")
        if any(given.kw_defaults) or (given.defaults and function.name != self.entry):
            self.refuse(function, f"only {self.entry} has parameters with a default")
        names = _parameters(function)
        for name in names:
            self._own_name(function, name)
        if len({*names}) != len(names):
            self.refuse(function, "two parameters have one name")

    def bound_names(self) -> Iterator[str]:
        """What the text binds, at module level and in its entry."""
        yield from (self.module.keys() | self.functions) - self._imports - self.literals.keys()
        entry = self.functions[self.entry]
        yield from _parameters(entry)
        stored = (x for x in ast.walk(entry) if isinstance(x, ast.Name))
        yield from (each.id for each in stored if isinstance(each.ctx, ast.Store))

    # --- functions and statements ----------------------------------------------------------------

    def _called(self, function: ast.FunctionDef, args: Sequence[object]) -> object:
        names = _parameters(function)
        if len(names) != len(args):
            self.refuse(function, f"{function.name} is called with {len(args)} arguments")
        if len(self._frames) > _MAX_CALLS:
            raise EmitError("functions of the text call each other too deeply")
        shadowed = [name for name in names if name in self._imports or name in self.functions]
        if shadowed:
            self.refuse(function, f"{shadowed[0]!a} shadows a name of the module")
        frame = _Frame(dict(zip(names, args, strict=True)), set(names))
        self._frames.append(frame)
        *body, last = function.body
        self._block(body, frame, following=last)
        returned = None
        if isinstance(last, ast.Return):
            frame.count += 1
            before, frame.last = frame.last, {}
            returned = None if last.value is None else self._value(last.value)
            frame.returned.update(frame.last)
            frame.last = before
        else:
            self._block([last], frame)
        self.statements += frame.count
        self._ran.setdefault(function.name, frame)
        self._frames.pop()
        return returned

    def _block(
        self, body: Sequence[ast.stmt], frame: _Frame, following: ast.stmt | None = None
    ) -> None:
        for number, stmt in enumerate(body):
            after = body[number + 1] if number + 1 < len(body) else following
            self._opening = type(after) is ast.Try
            kind = type(stmt)
            if kind is ast.Try:
                self._region(stmt, frame)  # type: ignore[arg-type]
                continue
            frame.count += 1
            if kind is ast.Assign:
                self._assign(stmt, frame)  # type: ignore[arg-type]
            elif kind is ast.Expr:
                self._value(stmt.value)  # type: ignore[attr-defined]
            elif kind is ast.Delete:
                for name in self._names(stmt, stmt.targets, "only names are deleted"):  # type: ignore[attr-defined]
                    if name not in frame.values:
                        self.refuse(stmt, f"{name!a} is deleted and not defined")
                    del frame.values[name]
                    frame.deletes.append((frame.count, name, stmt))
                frame.count -= 1
            elif kind is ast.Return:
                self.refuse(stmt, "a function must end with its only return")
            else:
                self._no_part(stmt, "functions")

    def _region(self, stmt: ast.Try, frame: _Frame) -> None:
        """``try: ... finally: close(...)``."""
        match stmt:
            case ast.Try(body, handlers=[], orelse=[], finalbody=[ast.Expr(ast.Call()) as close]):
                if len(body) != 1 or not isinstance(body[0], ast.Pass):
                    self._block(body, frame)
                self._final.update(range(close.lineno, (close.end_lineno or close.lineno) + 1))
                frame.count += 1
                self._value(close.value)
            case _:
                self.refuse(stmt, "a try does something else than to close a region by one call")

    def _assign(self, stmt: ast.Assign, frame: _Frame) -> None:
        if len(stmt.targets) != 1:
            self.refuse(stmt, "only one target is assigned to")
        value: Any = self._value(stmt.value)
        names = self._names(stmt, stmt.targets, "only names are assigned to")
        values: Sequence[object] = [value]
        if isinstance(stmt.targets[0], ast.Tuple):
            values = self._unpacked(stmt, value, len(names))
        for name, each in zip(names, values, strict=True):
            if name not in frame.bound:
                self._own_name(stmt, name)
                if name in self._imports or name in self.functions or name in frame.outer:
                    self.refuse(stmt, f"{name!a} shadows a name of the module")
                frame.bound.add(name)
            frame.values[name] = each
            frame.own[name], frame.last[name] = stmt, frame.count

    def _unpacked(self, stmt: ast.stmt, value: Any, count: int) -> Sequence[object]:
        if type(value) is Token and value.kind is not None and value.size == count:
            return [value.element(index) for index in range(count)]
        if type(value) in (tuple, list) and len(value) == count:
            return list(value)
        self.refuse(stmt, f"unpacks a result that is not known to have {count} elements")

    def _names(self, stmt: ast.stmt, targets: Sequence[ast.expr], why: str) -> list[str]:
        if len(targets) == 1 and isinstance(targets[0], ast.Tuple):
            targets = targets[0].elts
        names = [each.id for each in targets if isinstance(each, ast.Name)]
        if len(names) != len(targets) or len({*names}) != len(names):
            self.refuse(stmt, why)
        return names

    # --- expressions -----------------------------------------------------------------------------

    def _value(self, node: ast.expr) -> Any:
        kind = type(node)
        if kind is ast.Name:
            return self._named(node)  # type: ignore[arg-type]
        if kind is ast.Constant:
            return node.value  # type: ignore[attr-defined]
        read = _READ.get(kind)
        if read is None:
            self._no_part(node, "expressions")
        return read(self, node)

    def _named(self, node: ast.Name) -> object:
        name = node.id
        if self._frames:
            frame = self._frames[-1]
            frame.last[name] = frame.count
            if name in frame.values:
                return frame.values[name]
            if name in frame.bound:
                self.refuse(node, f"{name!a} is used after its del")
            frame.outer.add(name)
        if name in self.module:
            return self.module[name]
        found = _NOTHING if name.startswith("__") else getattr(builtins, name, _NOTHING)
        if found is _NOTHING:
            self.refuse(node, f"{name!a} is not defined")
        return found

    def _is_path(self, node: ast.expr) -> bool:
        """Whether ``node`` is read off an import or a builtin."""
        while isinstance(node, ast.Attribute):
            node = node.value
        if not isinstance(node, ast.Name) or (self._frames and node.id in self._frames[-1].bound):
            return False
        return node.id in self._imports or (node.id not in self.module and hasattr(builtins, node.id))  # fmt: skip

    @staticmethod
    def _table_of(node: ast.expr) -> str:
        """``__vllm_consts__`` or ``__vllm_submods__``, if ``node`` is an entry of it."""
        match node:
            case ast.Subscript(ast.Name(table), ast.Constant()) if table in (CONSTS, SUBMODS):
                return str(table)
        return ""

    def _attribute(self, node: ast.Attribute) -> object:
        value = self._value(node.value)
        if not self._is_path(node):
            return self._event(node.lineno, getattr, (value, node.attr), {})
        found = getattr(value, node.attr, _NOTHING)
        if found is _NOTHING:
            self.refuse(node, f"{node.attr!a} is not found in {ast.unparse(node.value)}")
        return found

    def _subscript(self, node: ast.Subscript) -> object:
        table = self._table_of(node)
        if table:
            index, entries = node.slice.value, self._tables[table]  # type: ignore[attr-defined]
            if type(index) is not int or not 0 <= index < len(entries):
                self.refuse(node, f"there is no {table}[{index}]")
            return entries[index]
        return self._item(node.lineno, self._value(node.value), self._index(node.slice))

    def _index(self, node: ast.expr) -> object:
        if isinstance(node, ast.Tuple):
            return tuple(map(self._index, node.elts))
        if not isinstance(node, ast.Slice):
            return self._value(node)
        parts = (node.lower, node.upper, node.step)
        return slice(*(None if each is None else self._value(each) for each in parts))

    def _tuple(self, node: ast.Tuple) -> object:
        return tuple(map(self._value, node.elts))

    def _list(self, node: ast.List) -> object:
        return list(map(self._value, node.elts))

    def _dict(self, node: ast.Dict) -> dict[Any, object]:
        if None in node.keys:
            self.refuse(node, "** in a dict is not part of emitted expressions")
        keys = [self._value(key) for key in node.keys if key is not None]
        return dict(zip(keys, map(self._value, node.values), strict=True))

    def _signed(self, node: ast.UnaryOp | ast.BinOp) -> object:
        literal = read_literal(node)
        if literal is not None:
            return literal.value
        operands = [node.operand] if isinstance(node, ast.UnaryOp) else [node.left, node.right]
        values = tuple(map(self._value, operands))
        return self._event(node.lineno, _SIGNS[type(node.op)], values, {})

    def _compare(self, node: ast.Compare) -> object:
        if len(node.ops) != 1 or type(node.ops[0]) not in _SIGNS:
            self._no_part(node, "expressions")
        values = (self._value(node.left), self._value(node.comparators[0]))
        return self._event(node.lineno, _SIGNS[type(node.ops[0])], values, {})

    def _call(self, node: ast.Call) -> object:
        function = node.func
        if isinstance(function, ast.Name) and function.id in self.functions:
            return self._own_call(node, self.functions[function.id])
        match function:
            case ast.Attribute(receiver, name) if not self._is_path(function):
                value = self._value(receiver)
                return self.called_method(node.lineno, value, name, *self._arguments(node))
            case ast.Call(ast.Name("getattr"), [receiver, ast.Constant(str(name))], []):
                value = self._value(receiver)
                return self.called_method(node.lineno, value, name, *self._arguments(node))
        return self.called(node.lineno, self._value(function), *self._arguments(node))

    def _own_call(self, node: ast.Call, function: ast.FunctionDef) -> object:
        """A call of a function of the text; ``__vllm_submods__`` is handed on under its name."""
        passed = [ast.unparse(each) for each in node.keywords]
        wanted = [f"{SUBMODS}={SUBMODS}"] if function.args.kwonlyargs else []
        if passed != wanted:
            self.refuse(node, f"{function.name} is called with other keywords")
        return self._called(function, [*map(self._value, node.args)])

    def _arguments(self, node: ast.Call) -> tuple[tuple[object, ...], dict[str, object]]:
        args = tuple([self._value(each) for each in node.args])
        kwargs: dict[str, object] = {}
        for each in node.keywords:
            if each.arg is not None:
                kwargs[each.arg] = self._value(each.value)
            elif isinstance(each.value, ast.Dict):
                kwargs.update(self._dict(each.value))
            else:
                self.refuse(node, "** of something other than a dict in place")
        return args, kwargs

    # --- events ----------------------------------------------------------------------------------

    def called(
        self, line: int, target: object, args: tuple[object, ...], kwargs: Mapping[str, object]
    ) -> object:
        """A call of a function that is not the text's own."""
        if isinstance(target, _Submod):
            target = target.target
        elif target is operator.getitem and len(args) == 2 and not kwargs:
            return self._item(line, *args)
        elif self.objects.made(target, args, kwargs):
            try:
                return target(*args)  # type: ignore[operator]
            except TypeError as error:
                self.refuse(line, f"the text fails where it runs: {error}")
        return self._event(line, target, args, kwargs)

    def called_method(
        self,
        line: int,
        value: object,
        name: str,
        args: tuple[object, ...],
        kwargs: Mapping[str, object],
    ) -> object:
        return self._event(line, f".{name}", (value, *args), kwargs)

    def _item(self, line: int, value: object, index: object) -> object:
        picked = self.objects.picked(value, index)
        return picked[0] if picked else self._event(line, operator.getitem, (value, index), {})

    def _event(
        self, line: int, target: object, args: tuple[object, ...], kwargs: Mapping[str, object]
    ) -> Token:
        if self.next >= len(self.graph.events):
            self.refuse(line, "the text does something that the graph does not")
        event = self.graph.events[self.next]
        self.next += 1
        if event.target is not target and not self._is_target(event.target, target):
            self._differ(line, event, "a call of something else")
        if len(event.args) != len(args) or len(event.kwargs) != len(kwargs):
            self._differ(line, event, "another number of arguments")
        for place, (ours, theirs) in enumerate(zip(event.args, args, strict=True)):
            if ours is not theirs and not self.same(ours, theirs):
                self._differ(line, event, f"another argument {place}")
        for (name, ours), (key, theirs) in zip(event.kwargs.items(), kwargs.items(), strict=True):
            if name != key or not self.same(ours, theirs):
                self._differ(line, event, f"another argument {name!a}")
        for each in (*args, *kwargs.values()):
            if type(each) is not Token:
                self.objects.hand_on(each)
        if event.region == "opens" and not self._opening:
            self._differ(line, event, "the region that this opens is not closed in a finally")
        if event.region == "closes" and line not in self._final:
            self._differ(line, event, "a region is closed outside of its finally")
        return event.result

    def _is_target(self, ours: object, theirs: object) -> bool:
        if isinstance(ours, str) or isinstance(theirs, str):
            return type(ours) is type(theirs) and ours == theirs
        try:
            return ours in self.direct and self.direct[ours] is theirs
        except TypeError:  # not hashable, so it has no other implementation
            return False

    def _differ(self, line: int, event: Event, what: str) -> NoReturn:
        raise EmitError(
            f"the text differs from the graph: {what}",
            where=f"{line_at(self.code, line)}; {node_where(event.node)}",
            hint="an edited file must still do what the graph does; a generated one that differs is a defect",
        )

    # --- what is asked of it besides ---------------------------------------------------------------

    def check_signature(self, placeholders: Iterable[torch.fx.Node]) -> None:
        """Check that the entry's parameters are the placeholders, in kind and default."""
        given = self.functions[self.entry].args
        stars = [("*", given.vararg), ("**", given.kwarg)]
        kinds = ["" for _ in given.args] + [kind for kind, each in stars if each is not None]
        defaults: list[ast.expr | None] = [None] * (len(given.args) - len(given.defaults))
        defaults += [*given.defaults, None, None]
        nodes = list(placeholders)
        if len(kinds) != len(nodes):
            raise EmitError(f"the text takes {len(kinds)} inputs and the graph {len(nodes)}")
        for node, kind, default in zip(nodes, kinds, defaults, strict=False):
            target = str(node.target)
            wanted = target[: len(target) - len(target.lstrip("*"))]
            expected = () if wanted else node.args[:1]
            fits = kind == wanted and (default is None) == (not expected)
            if fits and default is not None:
                fits = Sameness().same(expected[0], self._value(default))
            if not fits:
                where = node_where(node)
                raise EmitError(f"parameter {kind}{target} differs in kind or default", where=where)

    def check_lifetimes(self) -> None:
        """Check that each value is deleted right after the statement that uses it last; parameters and results are not.

        Raises:
            EmitError: one is deleted later, never, or although it is not the function's.
        """
        for frame in self._ran.values():
            left = {name: frame.last[name] for name in frame.own if name not in frame.returned}
            for number, name, stmt in frame.deletes:
                if left.pop(name, None) != number - 1:
                    why = "is not deleted right after its last use, or is not the function's"
                    self.refuse(stmt, f"{name!a} {why}")
            for name in left:
                self.refuse(frame.own[name], f"{name!a} is not deleted after its last use")


def _parameters(function: ast.FunctionDef) -> list[str]:
    given = function.args
    plain = [*given.args, *(each for each in (given.vararg, given.kwarg) if each is not None)]
    return [each.arg for each in plain]


_READ: Mapping[type[ast.AST], Callable[[TextRun, Any], Any]] = {
    ast.Attribute: TextRun._attribute,
    ast.Subscript: TextRun._subscript,
    ast.Tuple: TextRun._tuple,
    ast.List: TextRun._list,
    ast.Dict: TextRun._dict,
    ast.UnaryOp: TextRun._signed,
    ast.BinOp: TextRun._signed,
    ast.Compare: TextRun._compare,
    ast.Call: TextRun._call,
}
