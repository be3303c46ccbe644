"""From text to plan. In: the syntax tree of an expression or of a module of entries, and what names in it mean. Out: the same in the classes of `ir`.

It knows nothing of how the text was made, and nothing of it is executed. A kind of syntax that `ir` has no class for is refused. Where
names are read by their meaning, two texts that differ in names only are one plan: a parameter is a number, what a statement binds is
the number of that name, a value is its type and literal, all else is the object that it is.
"""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from piecework.codegen.plan import ir
from piecework.codegen.plan.literals import is_inline_literal, read_literal
from piecework.codegen.plan.names import BUILTINS
from piecework.codegen.plan.size_text import MODULES
from piecework.codegen.proof.grammar import line_at, parse_text
from piecework.errors import EmitError

_SIGNS: dict[type[ast.AST], str] = {
    **{ast.Eq: "==", ast.NotEq: "!=", ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">="},
    **{ast.Is: "is", ast.IsNot: "is not", ast.In: "in", ast.And: "and", ast.Or: "or"},
    **{ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.FloorDiv: "//", ast.Mod: "%"},
    **{ast.Pow: "**", ast.MatMult: "@", ast.LShift: "<<", ast.RShift: ">>"},
    **{ast.BitAnd: "&", ast.BitOr: "|", ast.BitXor: "^"},
    **{ast.USub: "-", ast.UAdd: "+", ast.Invert: "~", ast.Not: "not"},
}


class Words(Protocol):
    """What stands for names and values of a text."""

    def name(self, name: str) -> ir.Expr:
        """What a name stands for; `LookupError` with the reason if for nothing."""
        ...

    def attribute(self, value: ir.Expr, name: str) -> ir.Expr: ...

    def value(self, value: object, wish: str = "") -> ir.Expr:
        """What stands for a value; one without a literal gets a name near to ``wish``."""
        ...


class Unread(Exception):
    """Something that entries don't have."""

    def __init__(self, node: ast.AST, why: str) -> None:
        super().__init__(why)
        self.line: int = getattr(node, "lineno", 0)


def _require(holds: object, node: ast.AST, why: str) -> None:
    if not holds:
        raise Unread(node, why)


# --- expressions -------------------------------------------------------------------------------------


def read_expression(node: ast.expr, words: Words, holes: Mapping[str, ir.Expr]) -> ir.Expr:
    """``node``, in which names among ``holes`` stand for what they are given as.

    Raises:
        Unread: it is made of something that entries don't have.
    """

    def read(each: ast.expr) -> ir.Expr:
        return read_expression(each, words, holes)

    def read_all(nodes: Sequence[ast.expr]) -> tuple[ir.Expr, ...]:
        return tuple(map(read, nodes))

    match node:
        case ast.Name(id=name) if name in holes:
            return holes[name]
        case ast.Name(id=name):
            try:
                return words.name(name)
            except LookupError as error:
                raise Unread(node, error.args[0]) from None
        case ast.Constant(value=value):
            return words.value(value)
        case ast.Attribute(value=value, attr=attribute):
            try:
                return words.attribute(read(value), attribute)
            except LookupError as error:
                raise Unread(node, error.args[0]) from None
        case ast.Subscript(value=value, slice=index):
            return ir.Item(read(value), read(index))
        case ast.Call(func=function, args=args, keywords=keywords):
            named: list[tuple[str, ir.Expr]] = []
            stars: list[ir.Expr] = []
            for each in keywords:
                match each:
                    case ast.keyword(arg=str() as name, value=value):
                        named.append((name, read(value)))
                    case ast.keyword(value=ast.Dict(keys=keys, values=values)):  # not in ASCII
                        for key, value in zip(keys, values, strict=True):
                            text = getattr(key, "value", None)
                            _require(type(text) is str, node, "a keyword is no string")
                            named.append((str(text), read(value)))
                    case _:
                        stars.append(ir.Star("**", read(each.value)))
            arguments = ir.Arguments((*read_all(args), *stars), tuple(named))
            return ir.Call(read(function), arguments)
        case ast.Starred(value=value):
            return ir.Star("*", read(value))
        case ast.List(elts=elements):
            return ir.ListExpr(read_all(elements))
        case ast.Tuple(elts=elements):
            return ir.TupleExpr(read_all(elements))
        case ast.Set(elts=elements):
            return ir.SetExpr(read_all(elements))
        case ast.Dict(keys=keys, values=values) if None not in keys:
            written = read_all([key for key in keys if key is not None])
            return ir.DictExpr(tuple(zip(written, read_all(values), strict=True)))
        case ast.UnaryOp() | ast.BinOp() if (literal := read_literal(node)) is not None:
            return words.value(literal.value)
        case ast.UnaryOp(op=op, operand=operand):
            return _operation(node, [op], (read(operand),))
        case ast.BinOp(left=left, op=op, right=right):
            return _operation(node, [op], (read(left), read(right)))
        case ast.Compare(left=left, ops=operators, comparators=others):
            return _operation(node, operators, read_all([left, *others]))
        case ast.BoolOp(op=op, values=values):
            return _operation(node, [op], tuple(flat(_SIGNS[type(op)], read_all(values))))
        case ast.IfExp(test=test, body=body, orelse=orelse):
            return ir.Operation("if", read_all([body, test, orelse]))
        case _:
            raise Unread(node, f"{type(node).__name__} is not part of entries")


def _operation(node: ast.expr, signs: Sequence[ast.AST], operands: tuple[ir.Expr, ...]) -> ir.Expr:
    sign = _SIGNS.get(type(signs[0]))
    if sign is None or any(type(each) is not type(signs[0]) for each in signs):
        raise Unread(node, "this comparison is not part of entries")
    return ir.Operation(sign, operands)


def flat(sign: str, operands: Sequence[ir.Expr]) -> Iterator[ir.Expr]:
    """The operands of ``and``, and those of one in it."""
    for each in operands:
        if sign == "and" and isinstance(each, ir.Operation) and each.sign == sign:
            yield from each.operands
        else:
            yield each


# --- what names mean ---------------------------------------------------------------------------------


class Meanings:
    """`Words` that don't depend on what things are called: names and values become what they mean.

    Attributes:
        names: what names mean in the module.
        asked: those that were asked for.
    """

    def __init__(self, names: Mapping[str, ir.Expr]) -> None:
        self.names = names
        self.asked: set[str] = set()

    def value(self, value: object, wish: str = "") -> ir.Expr:
        """By type and literal where it has one, else by identity."""
        if is_inline_literal(value):
            return ir.Literal((type(value), repr(value)))
        return ir.Const(id(value))

    def name(self, name: str) -> ir.Expr:
        self.asked.add(name)
        if name in self.names:
            return self.names[name]
        if name not in BUILTINS:
            raise LookupError(f"{name!a} is not defined")
        return self.value(getattr(builtins, name))

    def attribute(self, value: ir.Expr, name: str) -> ir.Expr:
        """What a module has is looked up; what anything else has is said."""
        module = next((each for each in _MODULES if ir.Const(id(each)) == value), None)
        if module is None:
            return ir.Attribute(value, name)
        found = getattr(module, name, None)
        if found is None:
            raise LookupError(f"there is no {name!a} there")
        return self.value(found)


#: Modules whose attributes an entry may name; those that it may import.
_MODULES: Sequence[object] = (torch, torch.nn, *MODULES.values())
_IMPORTS: Mapping[str, object] = {"torch": torch, **MODULES}


def parameter_name(number: int) -> ir.Name:
    """What a parameter is, whatever it is called."""
    return ir.Name(f"parameter {number}")


def bound_name(number: int) -> ir.Name:
    """What a statement of a function binds, in order."""
    return ir.Name(f"bound {number}")


# --- modules -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ReadFunction:
    """A function by what its names mean: ``parameters`` is what they are called, and ``lines`` where its statements are."""

    function: ir.Function
    parameters: tuple[str, ...]
    line: int
    lines: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ReadModule:
    """What a module imports and defines, in order, and what its names mean."""

    imports: tuple[str, ...]
    functions: tuple[ReadFunction, ...]
    names: dict[str, ir.Expr]


def read_entry(code: str, provided: Sequence[str], consts: Mapping[str, object]) -> ReadModule:
    """Read the text of an entry.

    Args:
        provided: names that the runtime puts into the module.
        consts: names and values that come with the text.

    Raises:
        EmitError: the text is not Python, has a kind of syntax that entries don't have, binds a name twice or reads one that is
            not bound; names the line.
    """
    names: dict[str, ir.Expr] = {name: ir.Global(name) for name in provided}
    meanings = Meanings(names)
    names |= {name: meanings.value(value) for name, value in consts.items()}
    if len(names) != len(consts) + len(provided) or names.keys() & BUILTINS:
        raise EmitError("a constant of the entry has a name that is taken")
    imports: list[str] = []
    found: list[ast.FunctionDef] = []
    try:
        for stmt in parse_text(code, "the entry").body:
            match stmt:
                case ast.Import(names=[ast.alias(name=name, asname=None)]) if name in _IMPORTS:
                    _require(not found, stmt, "an import after a function")
                    imports.append(name)
                    meaning = meanings.value(_IMPORTS[name])
                case ast.FunctionDef(name=name, decorator_list=[], returns=None, type_comment=None):
                    generic = getattr(stmt, "type_params", None)
                    _require(not generic, stmt, "a function has type parameters")
                    found.append(stmt)
                    meaning = ir.Global(name)
                case _:
                    kind = type(stmt).__name__
                    raise Unread(stmt, f"{kind} is not part of an entry's module")
            bound = name in names or name in BUILTINS
            _require(not bound, stmt, f"{name!a} is bound twice")
            names[name] = meaning
        functions = tuple(_Function(stmt, names).read() for stmt in found)
    except Unread as error:
        raise EmitError(str(error), where=line_at(code, error.line)) from None
    return ReadModule(tuple(imports), functions, names)


class _Function(Meanings):
    """One function: its own names hide the module's everywhere in it, and mean something once they are bound."""

    def __init__(self, function: ast.FunctionDef, names: Mapping[str, ir.Expr]) -> None:
        super().__init__(names)
        self.function = function
        walked = list(ast.walk(function))
        bound = (each for each in walked if isinstance(each, ast.Name))
        self.own = {each.id for each in bound if not isinstance(each.ctx, ast.Load)}
        self.own |= {each.arg for each in walked if isinstance(each, ast.arg)}
        self.values: dict[str, ir.Name] = {}
        self.bound = 0

    def name(self, name: str) -> ir.Expr:
        if name not in self.own:
            return super().name(name)
        if name not in self.values:
            raise LookupError(f"{name!a} is read before it is bound")
        return self.values[name]

    def read(self) -> ReadFunction:
        function = self.function
        parameters = list(self._parameters(function.args))
        for number, (name, _, _) in enumerate(parameters):
            self._bind(function, name, parameter_name(number))
        named = tuple(
            ir.Parameter(parameter_name(number).id, kind, default)
            for number, (_, kind, default) in enumerate(parameters)
        )
        body = tuple(self._statement(each) for each in function.body)
        return ReadFunction(
            ir.Function(function.name, named, body, False),
            tuple(name for name, _, _ in parameters),
            function.lineno,
            tuple(each.lineno for each in function.body),
        )

    def _parameters(self, arguments: ast.arguments) -> Iterator[tuple[str, str, ir.Expr | None]]:
        plain = [(each, "/") for each in arguments.posonlyargs]
        plain += [(each, "") for each in arguments.args]
        missing: list[ast.expr | None] = [None] * (len(plain) - len(arguments.defaults))
        rows = list(zip(plain, [*missing, *arguments.defaults], strict=True))
        if arguments.vararg is not None:
            rows.append(((arguments.vararg, "*"), None))
        for each, given in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
            rows.append(((each, "k"), given))
        if arguments.kwarg is not None:
            rows.append(((arguments.kwarg, "**"), None))
        outside = Meanings(self.names)
        for (each, kind), given in rows:
            _require(each.annotation is None, each, "a parameter is annotated")
            default = None if given is None else read_expression(given, outside, {})
            yield each.arg, kind, default

    def _bind(self, at: ast.AST, name: str, value: ir.Name) -> str:
        _require(name not in self.values, at, f"{name!a} is bound twice")
        self.values[name] = value
        return str(value.id)

    def _expression(self, node: ast.expr) -> ir.Expr:
        return read_expression(node, self, {})

    def _statement(self, stmt: ast.stmt) -> ir.Stmt:
        match stmt:
            case ast.If(test=test, body=body, orelse=[]):
                return ir.If(self._expression(test), self._block(body))
            case ast.With(
                items=[ast.withitem(context_expr=context, optional_vars=None)], body=body
            ):
                return ir.With(self._expression(context), self._block(body))
            case ast.Return(value=ast.expr() as value):
                return ir.Return(self._expression(value))
            case ast.Expr(value=value):
                return ir.Assign((), False, self._expression(value))
            case ast.Assign(targets=[ast.Name() as target], value=value, type_comment=None):
                return self._assign(stmt, [target], value, unpack=False)
            case ast.Assign(targets=[ast.Tuple(elts=targets)], value=value, type_comment=None):
                return self._assign(stmt, targets, value, unpack=True)
            case _:
                raise Unread(stmt, f"{type(stmt).__name__} is not part of an entry's functions")

    def _assign(
        self, stmt: ast.stmt, targets: Sequence[ast.expr], value: ast.expr, *, unpack: bool
    ) -> ir.Stmt:
        read = self._expression(value)
        names: list[str] = []
        for target in targets:
            if not isinstance(target, ast.Name):
                raise Unread(stmt, "only names are bound")
            names.append(self._bind(stmt, target.id, bound_name(self.bound)))
            self.bound += 1
        return ir.Assign(tuple(names), unpack, read)

    def _block(self, body: Sequence[ast.stmt]) -> tuple[ir.Stmt, ...]:
        for stmt in body:
            _require(not isinstance(stmt, ast.Assign), stmt, "a name is bound under a condition")
        return tuple(map(self._statement, body))
