"""What the text of an entry says, read back. In: source text, and what the names of its module stand for. Out: its functions as forms, plain tuples to compare.

It knows nothing of how the text was made, and nothing of it is executed. Names disappear: a parameter is a number, what a statement
binds is the number of that statement, all else is the object that it is. A kind of syntax that is not read here is refused.
"""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

import torch

from piecework.codegen.grammar import parse_text
from piecework.codegen.literals import is_inline_literal, read_literal
from piecework.codegen.names import BUILTINS
from piecework.codegen.size_text import MODULES
from piecework.errors import EmitError

#: An expression or a statement, whose first element says of which kind.
Form = tuple[object, ...]

_IMPORTS: Mapping[str, object] = {"torch": torch, **MODULES}
_COMPARE: dict[type[ast.cmpop], str] = {
    **{ast.Eq: "==", ast.NotEq: "!=", ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">="},
    **{ast.Is: "is", ast.IsNot: "is not", ast.In: "in"},
}


@dataclass(frozen=True, slots=True)
class ReadParameter:
    """``kind`` is as in `entry_plan.Parameter`; ``default`` is None where there is none."""

    name: str
    kind: str
    default: Form | None


@dataclass(frozen=True, slots=True)
class ReadFunction:
    """A function: its statements as forms, each with its line."""

    line: int
    parameters: tuple[ReadParameter, ...]
    body: tuple[tuple[Form, int], ...]


@dataclass(frozen=True, slots=True)
class ReadModule:
    """A module: what it imports and defines, in order; and what its names mean in the end, a function its number."""

    imports: tuple[str, ...]
    functions: tuple[ReadFunction, ...]
    names: Mapping[str, Form]


def constant(value: object) -> Form:
    """A value: by type and literal where it has one, else by identity."""
    if is_inline_literal(value):
        return "literal", type(value), repr(value)
    return "object", id(value)


def all_of(forms: Sequence[Form]) -> Form:
    """The conjunction of ``forms``, flat."""
    parts: list[object] = []
    for form in forms:
        parts += form[1:] if form[0] == "and" else (form,)
    return cast(Form, parts[0]) if len(parts) == 1 else ("and", *parts)


def read_entry(code: str, provided: Sequence[str], consts: Mapping[str, object]) -> ReadModule:
    """Read the text of an entry.

    Args:
        provided: names that the runtime puts into the module.
        consts: names and values that come with the text.

    Raises:
        EmitError: the text is not Python, has a kind of syntax that entries don't have, binds a name twice or reads one that is
            not bound; names the line.
    """
    names: dict[str, Form] = {name: constant(value) for name, value in consts.items()}
    names |= {name: ("provided", name) for name in provided}
    if len(names) != len(consts) + len(provided) or names.keys() & BUILTINS:
        raise EmitError("a constant of the entry has a name that is taken")
    imports: list[str] = []
    found: list[ast.FunctionDef] = []
    try:
        for stmt in parse_text(code, "the entry").body:
            _module_statement(stmt, names, imports, found)
        functions = tuple(_Function(stmt, names).read() for stmt in found)
    except _Unread as error:
        raise EmitError(error.why, where=line_at(code, error.line)) from None
    return ReadModule(tuple(imports), functions, names)


def read_expression(text: str, holes: Mapping[str, Form], names: Mapping[str, Form]) -> Form:
    """The form of an expression in which ``holes`` are forms already, and other names are the module's."""
    return _Expressions(names, frozenset(holes), dict(holes)).form(_parsed(text))


def line_at(code: str, line: int) -> str:
    lines = code.splitlines()
    return f"line {line}: {lines[line - 1].strip() if 0 < line <= len(lines) else ''}"


@lru_cache(maxsize=256)
def _parsed(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body


class _Unread(Exception):
    """Something that entries don't have."""

    def __init__(self, node: ast.AST, why: str) -> None:
        super().__init__(why)
        self.line: int = getattr(node, "lineno", 0)
        self.why = why


def _require(holds: object, node: ast.AST, why: str) -> None:
    if not holds:
        raise _Unread(node, why)


# --- module level ------------------------------------------------------------------------------------


def _module_statement(
    stmt: ast.stmt, names: dict[str, Form], imports: list[str], found: list[ast.FunctionDef]
) -> None:
    match stmt:
        case ast.Import(names=[ast.alias(name=name, asname=None)]) if name in _IMPORTS:
            _require(not found, stmt, "an import after a function")
            imports.append(name)
            form = constant(_IMPORTS[name])
        case ast.FunctionDef(name=name, decorator_list=[], returns=None, type_comment=None):
            _require(not getattr(stmt, "type_params", None), stmt, "a function has type parameters")
            form = ("function", len(found))
            if list(names.values()).count(names.get(name, ())) > 1:
                del names[name]  # the function before it has another name too
            found.append(stmt)
        case ast.Assign(
            targets=[ast.Name(id=name)], value=ast.Name(id=function), type_comment=None
        ):
            form = names.get(function, ())
            _require(
                form[:1] == ("function",), stmt, f"{function!a} is no function that is defined"
            )
        case _:
            raise _Unread(stmt, f"{type(stmt).__name__} is not part of an entry's module")
    _require(name not in names and name not in BUILTINS, stmt, f"{name!a} is bound twice")
    names[name] = form


# --- functions ---------------------------------------------------------------------------------------


class _Function:
    """One function, and what its names mean so far."""

    def __init__(self, function: ast.FunctionDef, names: Mapping[str, Form]) -> None:
        self.function = function
        self.names = names
        self.bound = 0
        bound = (each for each in ast.walk(function) if isinstance(each, ast.Name))
        stored = {each.id for each in bound if not isinstance(each.ctx, ast.Load)}
        stored |= {each.arg for each in ast.walk(function) if isinstance(each, ast.arg)}
        self.expressions = _Expressions(names, frozenset(stored), {})

    def read(self) -> ReadFunction:
        parameters = tuple(self._parameters(self.function.args))
        for number, parameter in enumerate(parameters):
            self._bind(self.function, parameter.name, ("parameter", number))
        body = tuple((self._statement(each), each.lineno) for each in self.function.body)
        return ReadFunction(self.function.lineno, parameters, body)

    def _parameters(self, arguments: ast.arguments) -> Iterator[ReadParameter]:
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
        outside = _Expressions(self.names, frozenset(), {})
        for (each, kind), given in rows:
            _require(each.annotation is None, each, "a parameter is annotated")
            default = None if given is None else outside.form(given)
            yield ReadParameter(each.arg, kind, default)

    def _bind(self, at: ast.AST, name: str, form: Form) -> None:
        values = self.expressions.values
        _require(name not in values, at, f"{name!a} is bound twice")
        values[name] = form

    def _statement(self, stmt: ast.stmt) -> Form:
        form = self.expressions.form
        match stmt:
            case ast.If(test=test, body=body, orelse=[]):
                return "if", form(test), *map(self._inside, body)
            case ast.With(
                items=[ast.withitem(context_expr=context, optional_vars=None)], body=body
            ):
                return "with", form(context), *map(self._inside, body)
            case ast.Return(value=ast.expr() as value):
                return "return", form(value)
            case ast.Expr(value=value):
                return "do", form(value)
            case ast.Assign(targets=[ast.Name(id=name)], value=value, type_comment=None):
                read = form(value)
                self._bind(stmt, name, ("bound", self.bound))
                self.bound += 1
                return "bind", read
            case ast.Assign(targets=[ast.Tuple(elts=targets)], value=value, type_comment=None):
                read = form(value)
                for number, target in enumerate(targets):
                    if not isinstance(target, ast.Name):
                        raise _Unread(stmt, "only names are bound")
                    self._bind(stmt, target.id, ("bound", self.bound, number))
                self.bound += 1
                return "unpack", len(targets), read
            case _:
                raise _Unread(stmt, f"{type(stmt).__name__} is not part of an entry's functions")

    def _inside(self, stmt: ast.stmt) -> Form:
        _require(not isinstance(stmt, ast.Assign), stmt, "a name is bound under a condition")
        return self._statement(stmt)


# --- expressions -------------------------------------------------------------------------------------


class _Expressions:
    """Reads expressions.

    Attributes:
        names: what names mean in the module.
        own: names of the function, which hide the module's everywhere in it.
        values: what those mean that are bound so far.
    """

    def __init__(
        self, names: Mapping[str, Form], own: frozenset[str], values: dict[str, Form]
    ) -> None:
        self.names = names
        self.own = own
        self.values = values

    def form(self, node: ast.expr) -> Form:
        match node:
            case ast.Name(id=name):
                return self._name(node, name)
            case ast.Constant(value=value):
                return constant(value)
            case ast.Attribute(value=value, attr=attribute):
                return self._attribute(node, self.form(value), attribute)
            case ast.Subscript(value=value, slice=index):
                return "item", self.form(value), self.form(index)
            case ast.Call(func=function, args=args, keywords=keywords):
                named = tuple((each.arg, self.form(each.value)) for each in keywords)
                return "call", self.form(function), self._forms(args), named
            case ast.Starred(value=value):
                return "star", self.form(value)
            case ast.List(elts=elements) | ast.Tuple(elts=elements) | ast.Set(elts=elements):
                return type(node).__name__, *self._forms(elements)
            case ast.Dict(keys=keys, values=values) if None not in keys:
                written = [key for key in keys if key is not None]
                return "Dict", self._forms(written), self._forms(values)
            case ast.UnaryOp() | ast.BinOp():
                return self._arithmetic(node)
            case ast.Compare(left=left, ops=operators, comparators=others):
                signs = [_COMPARE.get(type(each), "") for each in operators]
                _require(all(signs), node, "this comparison is not part of entries")
                return "compare", self.form(left), *zip(signs, self._forms(others), strict=True)
            case ast.BoolOp(op=ast.And(), values=values):
                return all_of(self._forms(values))
            case ast.BoolOp(op=ast.Or(), values=values):
                return "or", *self._forms(values)
            case ast.IfExp(test=test, body=body, orelse=orelse):
                return "choice", self.form(test), self.form(body), self.form(orelse)
            case _:
                raise _Unread(node, f"{type(node).__name__} is not part of entries")

    def _forms(self, nodes: Sequence[ast.expr]) -> tuple[Form, ...]:
        return tuple(map(self.form, nodes))

    def _name(self, node: ast.expr, name: str) -> Form:
        if name in self.own:
            _require(name in self.values, node, f"{name!a} is read before it is bound")
            return self.values[name]
        if name in self.names:
            return self.names[name]
        _require(name in BUILTINS, node, f"{name!a} is not defined")
        return constant(getattr(builtins, name))

    def _attribute(self, node: ast.expr, value: Form, attribute: str) -> Form:
        """What a module has is looked up; what anything else has is a form."""
        module = _MODULES.get(value)
        if module is None:
            return "attribute", value, attribute
        found = getattr(module, attribute, None)
        _require(found is not None, node, f"there is no {attribute!a} there")
        return constant(found)

    def _arithmetic(self, node: ast.UnaryOp | ast.BinOp) -> Form:
        """Numbers with a sign, and complex ones, are literals of more than one word."""
        literal = read_literal(node)
        if literal is not None:
            return constant(literal.value)
        match node:
            case ast.UnaryOp(op=op, operand=operand):
                return type(op).__name__, self.form(operand)
            case ast.BinOp(left=left, op=op, right=right):
                return type(op).__name__, self.form(left), self.form(right)


#: Modules whose attributes an entry may name.
_MODULES: Mapping[Form, object] = {
    constant(module): module for module in (torch, torch.nn, *MODULES.values())
}
