"""What emitted text does, read from the text alone. In: Python source of an emitted module. Out: its events in order, and what it returns.

The text is parsed and run abstractly by Python's own rules of scope and order of evaluation; nothing of it is executed but
its imports. What is not in the small language of emitted modules is an `EmitError` that names the line.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import operator
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from piecework.codegen.targets import ENTRY_NAME
from piecework.codegen.trace import (
    Bound,
    Container,
    Element,
    Escapes,
    Event,
    Input,
    Known,
    Result,
    Value,
    picked,
)
from piecework.errors import EmitError

SUBMODS, CONSTS = "__vllm_submods__", "__vllm_consts__"

_BINARY: dict[type[ast.operator], object] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.MatMult: operator.matmul,
    ast.LShift: operator.lshift,
    ast.RShift: operator.rshift,
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
    ast.BitXor: operator.xor,
}
_COMPARE: dict[type[ast.cmpop], object] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_UNARY: dict[type[ast.unaryop], object] = {
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Invert: operator.invert,
    ast.Not: operator.not_,
}


class _Submods:
    """``__vllm_submods__`` itself: it can be indexed for a call and handed on, nothing else."""


_THE_SUBMODS = _Submods()


@dataclass(slots=True)
class EntryParameter:
    name: str
    prefix: str
    default: Value | None


@dataclass(slots=True)
class TextTrace:
    """The events of the text, its result, and for each event whose result is unpacked into how many targets."""

    events: list[Event] = field(default_factory=list)
    unpacked: dict[int, int] = field(default_factory=dict)
    parameters: list[EntryParameter] = field(default_factory=list)
    returned: Value = field(default_factory=lambda: Known(None))
    statements: int = 0


def trace_text(
    code: str,
    tree: ast.Module,
    *,
    submod_names: Sequence[str],
    consts: Sequence[object],
    bound: Mapping[str, str],
    lifetimes: bool,
) -> TextTrace:
    """Trace the module ``tree`` (parsed from ``code``) from the call of its entry.

    With ``lifetimes``, each local must be deleted in the statement after its last use, and parameters and results must not.

    Raises:
        EmitError: the text leaves the language, uses a name that is not defined at that point, or keeps one for too long.
    """
    return _TextTracer(code, submod_names, consts, bound, lifetimes).run(tree)


@dataclass(slots=True)
class _Frame:
    function: ast.FunctionDef
    locals: frozenset[str]
    values: dict[str, Value | _Submods]
    statement: int = 0
    last_use: dict[str, int] = field(default_factory=dict)
    deleted: dict[str, int] = field(default_factory=dict)


class _TextTracer:
    def __init__(
        self,
        code: str,
        submod_names: Sequence[str],
        consts: Sequence[object],
        bound: Mapping[str, str],
        lifetimes: bool,
    ) -> None:
        self.lifetimes = lifetimes
        self.lines = code.splitlines()
        self.submod_names = submod_names
        self.consts = consts
        self.module: dict[str, Value | ast.FunctionDef] = {n: Bound(p) for n, p in bound.items()}
        self.defaults: dict[str, dict[str, Value]] = {}
        self.local_names: dict[str, frozenset[str]] = {}
        self.trace = TextTrace()
        self.escapes = Escapes()
        self.frame: _Frame | None = None
        self.active: list[str] = []
        self.serial = 0

    def run(self, tree: ast.Module) -> TextTrace:
        for stmt in tree.body:
            self._module_statement(stmt)
        entry = self.module.get(ENTRY_NAME)
        if not isinstance(entry, ast.FunctionDef):
            raise EmitError(f"stitching source defines no function {ENTRY_NAME}")
        self.trace.returned = self._call_entry(entry)
        return self.trace

    def _refuse(self, node: ast.AST, why: str) -> NoReturn:
        line = getattr(node, "lineno", 0)
        text = self.lines[line - 1].strip() if 0 < line <= len(self.lines) else ""
        raise EmitError(why, where=f"line {line}: {text}" if line else None)

    # --- module level ----------------------------------------------------------------------------

    def _module_statement(self, stmt: ast.stmt) -> None:
        match stmt:
            case ast.Import(names=names):
                for each in names:
                    if each.asname is not None:
                        self._refuse(stmt, "import ... as is not part of emitted modules")
                    try:
                        importlib.import_module(each.name)
                    except ImportError as error:
                        self._refuse(stmt, f"import failed: {error}")
                    root = each.name.partition(".")[0]
                    self.module[root] = Known(sys.modules[root], is_global=True)
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                resolved = self._expr(value)
                if not isinstance(resolved, Known) or self.trace.events:
                    self._refuse(stmt, "only paths and constants may be named at module level")
                self.module[name] = resolved
            case ast.FunctionDef(name=name):
                self._define(stmt)
                self.module[name] = stmt
            case _:
                self._refuse(stmt, f"{type(stmt).__name__} is not part of emitted modules")

    def _define(self, function: ast.FunctionDef) -> None:
        arguments = function.args
        if function.decorator_list or arguments.posonlyargs or function.returns:
            self._refuse(function, "decorators and annotations are not part of emitted modules")
        if any(each.arg != SUBMODS for each in arguments.kwonlyargs):
            self._refuse(function, f"the only keyword-only parameter is {SUBMODS}")
        if any(default is not None for default in arguments.kw_defaults):
            self._refuse(function, f"{SUBMODS} has no default")
        named = arguments.args[len(arguments.args) - len(arguments.defaults) :]
        self.defaults[function.name] = {
            each.arg: self._value(default)
            for each, default in zip(named, arguments.defaults, strict=True)
        }
        if self.trace.events:
            self._refuse(function, "a default may not call anything")
        self.local_names[function.name] = frozenset(_local_names(function))

    # --- functions -------------------------------------------------------------------------------

    def _call_entry(self, entry: ast.FunctionDef) -> Value:
        arguments = entry.args
        if [each.arg for each in arguments.kwonlyargs] != [SUBMODS]:
            self._refuse(entry, f"{ENTRY_NAME} must take {SUBMODS} as keyword")
        values: dict[str, Value | _Submods] = {SUBMODS: _THE_SUBMODS}
        named: list[tuple[str, str]] = [(each.arg, "") for each in arguments.args]
        named += [(arguments.vararg.arg, "*")] if arguments.vararg else []
        named += [(arguments.kwarg.arg, "**")] if arguments.kwarg else []
        for position, (name, prefix) in enumerate(named):
            values[name] = Input(position)
            default = None if prefix else self.defaults[ENTRY_NAME].get(name)
            self.trace.parameters.append(EntryParameter(name, prefix, default))
        return self._run(entry, values)

    def _call_function(
        self,
        call: ast.Call,
        function: ast.FunctionDef,
        args: tuple[Value | _Submods, ...],
        kwargs: tuple[tuple[str, Value | _Submods], ...],
    ) -> Value:
        arguments = function.args
        names = [each.arg for each in arguments.args]
        if arguments.vararg or arguments.kwarg or len(args) > len(names):
            self._refuse(call, f"{function.name} does not take these arguments")
        values: dict[str, Value | _Submods] = dict(zip(names, args, strict=False))
        allowed = {*names, *(each.arg for each in arguments.kwonlyargs)}
        for name, value in kwargs:
            if name in values or name not in allowed:
                self._refuse(call, f"{function.name} does not take {name!a} here")
            values[name] = value
        for name, default in self.defaults[function.name].items():
            values.setdefault(name, default)
        if set(values) != allowed:
            self._refuse(call, f"{function.name} gets too few arguments")
        if any((name == SUBMODS) != (value is _THE_SUBMODS) for name, value in values.items()):
            self._refuse(call, f"{SUBMODS} must be handed on as itself")
        return self._run(function, values)

    def _run(self, function: ast.FunctionDef, values: dict[str, Value | _Submods]) -> Value:
        if function.name in self.active:
            self._refuse(function, f"{function.name} calls itself")
        outer = self.frame
        frame = self.frame = _Frame(function, self.local_names[function.name], values)
        self.active.append(function.name)
        returned: Value = Known(None)
        for number, stmt in enumerate(function.body):
            self.trace.statements += 1
            # Deletes count with the statement that they follow.
            frame.statement += not isinstance(stmt, ast.Delete)
            if isinstance(stmt, ast.Return):
                if number != len(function.body) - 1:
                    self._refuse(stmt, "statements follow the return")
                returned = self._value(stmt.value, nested=True) if stmt.value else Known(None)
            else:
                self._statement(stmt)
        self.active.pop()
        if self.lifetimes:
            self._check_lifetimes(frame)
        self.frame = outer
        return returned

    def _statement(self, stmt: ast.stmt) -> None:
        assert self.frame is not None
        values = self.frame.values
        match stmt:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                self._define_local(name, self._value(value))
            case ast.Assign(targets=[ast.Tuple(elts=elements)], value=value):
                names = [each.id for each in elements if isinstance(each, ast.Name)]
                if len(names) != len(elements) or len(set(names)) != len(names):
                    self._refuse(stmt, "only distinct names can be unpacked to")
                for name, part in zip(names, self._unpack(stmt, value, len(names)), strict=True):
                    self._define_local(name, part)
            case ast.Expr(value=value):
                self._value(value)
            case ast.Delete(targets=targets):
                for target in _flat(targets):
                    if not isinstance(target, ast.Name):
                        self._refuse(stmt, "only names are deleted")
                    if target.id not in values or target.id == SUBMODS:
                        self._refuse(stmt, f"{target.id!a} is deleted but not defined here")
                    del values[target.id]
                    self.frame.deleted[target.id] = self.frame.statement
            case _:
                self._refuse(stmt, f"{type(stmt).__name__} is not part of emitted functions")

    def _check_lifetimes(self, frame: _Frame) -> None:
        function = frame.function
        ends = function.body and isinstance(function.body[-1], ast.Return)
        returned = frame.statement if ends else -1
        for name in frame.deleted.keys() - frame.last_use.keys():
            self._refuse(function, f"parameter {name!a} is deleted by {function.name}")
        for name, last in frame.last_use.items():
            if last != returned and frame.deleted.get(name) != last:
                self._refuse(
                    function, f"{name!a} is not deleted right after its last use in {function.name}"
                )

    def _define_local(self, name: str, value: Value) -> None:
        assert self.frame is not None
        self.frame.values[name] = value
        self.frame.last_use[name] = self.frame.statement

    def _unpack(self, stmt: ast.stmt, value: ast.expr, count: int) -> Sequence[Value]:
        result = self._value(value)
        elements = self.escapes.elements_of(result)
        if elements is not None:
            if len(elements) != count:
                self._refuse(stmt, f"{len(elements)} elements are unpacked to {count} names")
            return list(elements)
        if not isinstance(result, Result):
            self._refuse(stmt, "what is unpacked is not the result of a call")
        if self.trace.unpacked.setdefault(result.event, count) != count:
            self._refuse(stmt, "one result is unpacked to different numbers of names")
        return [Element(result.event, index) for index in range(count)]

    # --- expressions -----------------------------------------------------------------------------

    def _value(self, node: ast.expr, *, nested: bool = False) -> Value:
        value = self._expr(node, nested=nested)
        if isinstance(value, _Submods):
            self._refuse(node, f"{SUBMODS} is used other than to call its entries")
        return value

    def _expr(self, node: ast.expr, *, nested: bool = False) -> Value | _Submods:
        match node:
            case ast.Name(id=name):
                return self._name(node, name)
            case ast.Constant(value=literal):
                return Known(literal)
            case ast.Call():
                return self._call(node, nested)
            case ast.Attribute(value=base, attr=attribute):
                owner = self._value(base, nested=True)
                if isinstance(owner, Known) and owner.is_global:
                    return self._global_attribute(node, owner.value, attribute)
                return self._event(node, "call", getattr, (owner, Known(attribute)))
            case ast.Subscript():
                return self._subscript(node)
            case ast.Tuple(elts=items) | ast.List(elts=items):
                kind = tuple if isinstance(node, ast.Tuple) else list
                return self._container(kind, [self._value(each, nested=True) for each in items])
            case ast.Dict(keys=keys, values=values):
                return self._dict(node, keys, values)
            case ast.Slice(lower=lower, upper=upper, step=step):
                parts = [
                    Known(None) if part is None else self._value(part, nested=True)
                    for part in (lower, upper, step)
                ]
                return self._container(slice, parts)
            case ast.UnaryOp() | ast.BinOp() | ast.Compare():
                return self._operator(node)
            case _:
                self._refuse(node, f"{type(node).__name__} is not part of emitted expressions")

    def _name(self, node: ast.expr, name: str) -> Value | _Submods:
        if self.frame is not None and name in self.frame.locals:
            value = self.frame.values.get(name)
            if value is None:
                self._refuse(node, f"{name!a} is used before it is defined or after its del")
            if name in self.frame.last_use:
                self.frame.last_use[name] = self.frame.statement
            return value
        found = self.module.get(name)
        if isinstance(found, ast.FunctionDef):
            self._refuse(node, f"function {name!a} is used other than to be called")
        if found is not None:
            return found
        if name in (SUBMODS, CONSTS) or not hasattr(builtins, name):
            self._refuse(node, f"{name!a} is not defined")
        return Known(getattr(builtins, name), is_global=True)

    def _global_attribute(self, node: ast.expr, owner: object, attribute: str) -> Value:
        try:
            return Known(getattr(owner, attribute), is_global=True)
        except (AttributeError, ImportError, RuntimeError) as error:
            self._refuse(node, f"{attribute!a} is not found: {error}")

    def _subscript(self, node: ast.Subscript) -> Value:
        match node:
            case ast.Subscript(
                value=ast.Name(id=name), slice=ast.Constant(value=index)
            ) if name == CONSTS and self._is_not_redefined(name):
                if type(index) is not int or not 0 <= index < len(self.consts):
                    self._refuse(node, f"there is no constant {index!a}")
                return Known(self.consts[index])
        base = self._value(node.value, nested=True)
        index_value = self._value(node.slice, nested=True)
        return self._event(node, "call", operator.getitem, (base, index_value))

    def _dict(
        self, node: ast.expr, keys: Sequence[ast.expr | None], values: Sequence[ast.expr]
    ) -> Value:
        items: list[Value] = []
        for key, value in zip(keys, values, strict=True):
            if key is None:
                self._refuse(node, "** in a dict is not part of emitted expressions")
            items += (self._value(key, nested=True), self._value(value, nested=True))
        return self._container(dict, items)

    def _operator(self, node: ast.UnaryOp | ast.BinOp | ast.Compare) -> Value:
        match node:
            case ast.UnaryOp(op=op, operand=operand):
                value = self._value(operand, nested=True)
                number = _number(operand, value)
                if isinstance(op, ast.USub) and number is not None:
                    return Known(-number)
                return self._event(node, "call", _UNARY[type(op)], (value,))
            case ast.BinOp(left=left, op=op, right=right):
                first, second = self._value(left, nested=True), self._value(right, nested=True)
                folded = _complex_literal(op, left, first, right, second)
                if folded is not None:
                    return Known(folded)
                return self._event(node, "call", _BINARY[type(op)], (first, second))
            case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _COMPARE:
                first, second = self._value(left, nested=True), self._value(right, nested=True)
                return self._event(node, "call", _COMPARE[type(op)], (first, second))
            case _:
                self._refuse(node, "this comparison is not part of emitted expressions")

    def _container(self, kind: type, items: Sequence[Value]) -> Container:
        self.serial += 1
        return Container(kind, tuple(items), self.serial)

    # --- calls -----------------------------------------------------------------------------------

    def _call(self, node: ast.Call, nested: bool) -> Value:
        match node.func:
            case ast.Name(id=name) if isinstance(
                function := self._function_named(name), ast.FunctionDef
            ):
                return self._call_function(node, function, *self._arguments(node))
            case ast.Subscript(value=ast.Name(id=name), slice=ast.Constant(value=index)) if (
                name == SUBMODS
            ):
                if self._expr(node.func.value) is not _THE_SUBMODS:
                    self._refuse(node, f"{SUBMODS} is not what was passed")
                if type(index) is not int or not 0 <= index < len(self.submod_names):
                    self._refuse(node, f"there is no submodule {index!a}")
                args, kwargs = self._plain_arguments(node)
                return self._event(node, "submod", self.submod_names[index], args, kwargs)
            case ast.Attribute(value=base, attr=method):
                owner = self._value(base, nested=True)
                if not (isinstance(owner, Known) and owner.is_global):
                    return self._method(node, owner, method)
                target = self._global_attribute(node, owner.value, method)
            case ast.Call(
                func=ast.Name(id="getattr"),
                args=[base, ast.Constant(value=str(method))],
                keywords=[],
            ) if self._is_not_redefined("getattr"):
                return self._method(node, self._value(base, nested=True), method)
            case _:
                target = self._value(node.func, nested=True)
        if not isinstance(target, Known):
            self._refuse(node, "a computed value is called")
        args, kwargs = self._plain_arguments(node)
        if nested and not kwargs and _builds(target, len(args)):
            assert isinstance(target.value, type)
            return self._container(target.value, args)
        return self._event(node, "call", target.value, args, kwargs)

    def _is_not_redefined(self, name: str) -> bool:
        return name not in self.module and not (self.frame and name in self.frame.locals)

    def _function_named(self, name: str) -> ast.FunctionDef | None:
        if self.frame is not None and name in self.frame.locals:
            return None
        found = self.module.get(name)
        return found if isinstance(found, ast.FunctionDef) else None

    def _method(self, node: ast.Call, receiver: Value, method: str) -> Value:
        args, kwargs = self._plain_arguments(node)
        return self._event(node, "method", method, (receiver, *args), kwargs)

    def _arguments(
        self, node: ast.Call
    ) -> tuple[tuple[Value | _Submods, ...], tuple[tuple[str, Value | _Submods], ...]]:
        args = tuple(self._expr(each, nested=True) for each in node.args)
        kwargs: list[tuple[str, Value | _Submods]] = []
        for keyword in node.keywords:
            if keyword.arg is not None:
                kwargs.append((keyword.arg, self._expr(keyword.value, nested=True)))
                continue
            if not isinstance(keyword.value, ast.Dict):
                self._refuse(node, "** of something other than a dict in place")
            for key, value in zip(keyword.value.keys, keyword.value.values, strict=True):
                if not isinstance(key, ast.Constant) or type(key.value) is not str:
                    self._refuse(node, "** of a dict whose keys are not strings")
                kwargs.append((key.value, self._value(value, nested=True)))
        if len({name for name, _ in kwargs}) != len(kwargs):
            self._refuse(node, "a keyword is given twice")
        return args, tuple(kwargs)

    def _plain_arguments(
        self, node: ast.Call
    ) -> tuple[tuple[Value, ...], tuple[tuple[str, Value], ...]]:
        args, kwargs = self._arguments(node)
        plain = tuple(each for each in args if not isinstance(each, _Submods))
        named = tuple((key, each) for key, each in kwargs if not isinstance(each, _Submods))
        if len(plain) != len(args) or len(named) != len(kwargs):
            self._refuse(node, f"{SUBMODS} is handed to something outside of this module")
        return plain, named

    def _event(
        self,
        node: ast.expr,
        kind: str,
        target: object,
        args: tuple[Value, ...],
        kwargs: tuple[tuple[str, Value], ...] = (),
    ) -> Value:
        if target is operator.getitem and len(args) == 2 and not kwargs:
            index = args[1].value if isinstance(args[1], Known) else None
            element = picked(self.escapes.elements_of(args[0]), index)
            if element is not None:
                return element
        self.escapes.note(args)
        self.escapes.note(tuple(value for _, value in kwargs))
        self.trace.events.append(Event(kind, target, args, kwargs, node.lineno))
        return Result(len(self.trace.events) - 1)


def _flat(targets: Sequence[ast.expr]) -> Iterator[ast.expr]:
    """``del (a, b)``, as long lists of names are written, deletes both."""
    for target in targets:
        if isinstance(target, ast.Tuple):
            yield from target.elts
        else:
            yield target


def _local_names(function: ast.FunctionDef) -> Iterator[str]:
    """The names that ``function`` binds, by the statements that emitted functions may have; others are refused later."""
    arguments = function.args
    for each in (*arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg):
        if each is not None:
            yield each.arg
    for stmt in function.body:
        if not isinstance(stmt, (ast.Assign, ast.Delete)):
            continue
        yield from (each.id for each in _flat(stmt.targets) if isinstance(each, ast.Name))


def _builds(target: Known, count: int) -> bool:
    """True if a nested call of ``target`` is how a slice or a namedtuple is written."""
    if target.is_global:
        return target.value is slice and count == 3
    kind = target.value
    return isinstance(kind, type) and issubclass(kind, tuple) and hasattr(kind, "_fields")


def _number(node: ast.expr, value: Value) -> int | float | complex | None:
    if not isinstance(node, ast.Constant) or not isinstance(value, Known):
        return None
    number = value.value
    if type(number) in (int, float, complex):
        assert isinstance(number, (int, float, complex))
        return number
    return None


def _complex_literal(
    op: ast.operator, left: ast.expr, first: Value, right: ast.expr, second: Value
) -> complex | None:
    """``1 - 2j`` is one literal; its real part may have a sign."""
    number = _number(right, second)
    bare = left.operand if isinstance(left, ast.UnaryOp) else left
    real = first.value if isinstance(first, Known) and isinstance(bare, ast.Constant) else None
    if type(number) is not complex or type(real) not in (int, float):
        return None
    assert isinstance(real, (int, float))
    if isinstance(op, ast.Add):
        return real + number
    return real - number if isinstance(op, ast.Sub) else None
