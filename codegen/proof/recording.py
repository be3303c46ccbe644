"""Makes a text record what it does: each call, sign, attribute and item becomes a call of a recorder, all else stays Python's.

What emitted text may consist of is what is read here; any other syntax is refused with its line. That leaves a straight line, so one run says what every
run does.
"""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterator, Sequence
from typing import NoReturn

from piecework.codegen.plan.literals import read_literal
from piecework.codegen.plan.names import CONSTS, SUBMODS
from piecework.errors import EmitError


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


class RecordingText:
    """A text that records.

    Attributes:
        tree: what is run. It calls ``__call__``, ``__method__``, ``__attribute__``, ``__item__``, ``__sign__`` and ``__unpack__``, each with the
            number of its line first.
        functions: name → definition, as it is written.
        literals: numbers that module level names.
        statements: how many statements the functions have, but for ``del``.
        opening, closing: lines that a ``try`` follows, and those in a ``finally``.
    """

    def __init__(self, code: str, tree: ast.Module, entry: str) -> None:
        self.code, self._entry = code, entry
        self.functions: dict[str, ast.FunctionDef] = {}
        self.literals: dict[str, object] = {}
        self.statements = 0
        self.opening: set[int] = set()
        self.closing: set[int] = set()
        self._imports: set[str] = set()
        self._bound: set[str] = set()  # in the module, or in the function that is read
        self.tree = ast.Module([self._module_level(stmt) for stmt in tree.body], [])

    def line_at(self, line: int) -> str:
        """Where an error is: the number of a line, and its text."""
        lines = self.code.splitlines()
        return f"line {line}: {lines[line - 1].strip() if 0 < line <= len(lines) else ''}"

    def refuse(self, at: ast.AST | int, why: str) -> NoReturn:
        line = at if isinstance(at, int) else getattr(at, "lineno", 0)
        raise EmitError(why, where=self.line_at(line) if line else None)

    def _no_part(self, at: ast.AST, of: str) -> NoReturn:
        self.refuse(at, f"{type(at).__name__} is not part of emitted {of}")

    # --- statements --------------------------------------------------------------------------------

    def _module_level(self, stmt: ast.stmt) -> ast.stmt:
        match stmt:
            case ast.Import(names):
                if any(each.asname for each in names):
                    self.refuse(stmt, "import ... as is not part of emitted modules")
                self._imports.update(each.name.partition(".")[0] for each in names)
                return stmt
            case ast.Assign([ast.Name(name)], value):
                self._bind(stmt, name)
                literal = read_literal(value)
                if literal is not None:
                    self.literals[name] = literal.value
                elif not self._is_path(value) and not _is_entry(value, CONSTS):
                    self._no_part(value, "modules")
                return stmt
            case ast.FunctionDef():
                self._bind(stmt, stmt.name)
                return self._function(stmt)
        self._no_part(stmt, "modules")

    def _bind(self, at: ast.AST, name: str) -> None:
        if name.startswith("__"):
            why = "is a name of Python's or of the emitted module, which no text may bind"
            self.refuse(at, f"{name!a} {why}")
        if name in self._imports:
            self.refuse(at, f"{name!a} is the name of an import")
        self._bound.add(name)

    def _function(self, function: ast.FunctionDef) -> ast.FunctionDef:
        given = function.args
        names = [each for each in ast.walk(given) if isinstance(each, ast.arg)]
        noted = [each.annotation for each in names] + [function.returns, *function.decorator_list]
        if any(noted) or getattr(function, "type_params", None):
            self.refuse(function, "decorators and annotations are not part of emitted modules")
        kept = [each.arg for each in given.kwonlyargs]
        stars = [each for each in (given.vararg, given.kwarg) if each is not None]
        plain = not (given.posonlyargs or any(given.kw_defaults))
        plain = plain and (function.name == self._entry or not stars)
        if not plain or kept not in ([], [SUBMODS]):
            self.refuse(function, f"the only parameter that is not plain is {SUBMODS}")
        defaults = [self._value(each) for each in given.defaults]
        outside = set(self._bound)
        for each in names:
            if each not in given.kwonlyargs:
                self._bind(function, each.arg)
        self.functions[function.name] = function
        keywords = {key: getattr(given, key) for key in given._fields}
        # The entry is run with one token for what a star collects.
        keywords |= {"args": [*given.args, *stars], "vararg": None, "kwarg": None}
        keywords["defaults"] = defaults
        body = list(self._block(function.body, function.body[-1]))
        self._bound = outside
        made = ast.FunctionDef(function.name, ast.arguments(**keywords), body, [], None, None)
        return ast.copy_location(made, function)

    def _block(self, body: Sequence[ast.stmt], end: ast.stmt | None = None) -> Iterator[ast.stmt]:
        """The statements of ``body``, regions written out; ``end`` may return."""
        for stmt, after in zip(body, [*body[1:], None], strict=True):
            if isinstance(after, ast.Try):
                self.opening.update(_lines(stmt))
            self.statements += not isinstance(stmt, (ast.Delete, ast.Try, ast.Pass))
            made: ast.stmt
            match stmt:
                case ast.Assign([target], value):
                    made = ast.Assign([target], self._assigned(stmt, target, value))
                case ast.Expr(value):
                    made = ast.Expr(self._value(value))
                case ast.Delete(targets):
                    self._names(stmt, targets, "only names are deleted")
                    made = stmt
                case ast.Try(inner, [], [], [ast.Expr(ast.Call()) as close]):
                    yield from self._block(inner)
                    self.closing.update(_lines(close))
                    yield from self._block([close])
                    continue
                case ast.Try():
                    why = "a try does something else than to close a region by one call"
                    self.refuse(stmt, why)
                case ast.Pass() if end is None:
                    continue
                case ast.Return(value) if stmt is end:
                    made = ast.Return(None if value is None else self._value(value))
                case ast.Return():
                    self.refuse(stmt, "a function must end with its only return")
                case _:
                    self._no_part(stmt, "functions")
            yield ast.copy_location(made, stmt)

    def _assigned(self, stmt: ast.stmt, target: ast.expr, value: ast.expr) -> ast.expr:
        found = self._value(value)
        names = self._names(stmt, [target], "only names are assigned to")
        for name in names:
            self._bind(stmt, name)
        if isinstance(target, ast.Name):
            return found
        return _recorded(stmt, "__unpack__", found, _constant(stmt, len(names)))

    def _names(self, stmt: ast.stmt, targets: Sequence[ast.expr], why: str) -> list[str]:
        if len(targets) == 1 and isinstance(targets[0], ast.Tuple):
            targets = targets[0].elts
        names = [each.id for each in targets if isinstance(each, ast.Name)]
        if len(names) != len(targets) or len({*names}) != len(names):
            self.refuse(stmt, why)
        return names

    # --- expressions -------------------------------------------------------------------------------

    def _value(self, node: ast.expr) -> ast.expr:
        at = {"lineno": node.lineno, "col_offset": 0}
        match node:
            case ast.Name(name):
                if name.startswith("__") and name not in (SUBMODS, CONSTS):
                    self.refuse(node, f"{name!a} is not defined")
                return node
            case ast.Constant():
                return node
            case ast.Call() | ast.UnaryOp() | ast.BinOp() if read_literal(node) is not None:
                return node
            case ast.Call():
                return self._call(node)
            case ast.Subscript(value, index):
                if _is_entry(node, CONSTS) or _is_entry(node, SUBMODS):
                    return node
                item = _recorded(node, "__item__", self._value(value))
                return ast.Subscript(item, self._index(index), ast.Load(), **at)
            case ast.Tuple(items):
                return ast.Tuple([*map(self._value, items)], ast.Load(), **at)
            case ast.List(items):
                return ast.List([*map(self._value, items)], ast.Load(), **at)
            case ast.Dict(keys, values) if None not in keys:
                every: list[ast.expr | None] = [self._value(key) for key in keys if key is not None]
                return ast.Dict(every, [*map(self._value, values)], **at)
            case ast.Attribute(value, name):
                if self._is_path(node):
                    return node
                return _recorded(node, "__attribute__", self._value(value), _constant(node, name))
            case ast.UnaryOp(sign, operand):
                return self._sign(node, sign, operand)
            case ast.BinOp(left, sign, right) | ast.Compare(left, [sign], [right]):
                return self._sign(node, sign, left, right)
        self._no_part(node, "expressions")

    def _sign(self, node: ast.expr, sign: ast.AST, *operands: ast.expr) -> ast.expr:
        name = _constant(node, type(sign).__name__)
        return _recorded(node, "__sign__", name, *map(self._value, operands))

    def _index(self, node: ast.expr) -> ast.expr:
        if isinstance(node, ast.Tuple):
            return ast.copy_location(ast.Tuple([*map(self._index, node.elts)], ast.Load()), node)
        if not isinstance(node, ast.Slice):
            return self._value(node)
        parts = (node.lower, node.upper, node.step)
        return ast.copy_location(ast.Slice(*(each and self._value(each) for each in parts)), node)

    def _call(self, node: ast.Call) -> ast.expr:
        head: list[ast.expr]
        match node.func:
            case ast.Attribute(value, name) if not self._is_path(node.func):
                kind, head = "__method__", [self._value(value), _constant(node, name)]
            case ast.Call(ast.Name("getattr"), [value, ast.Constant(str()) as name], []):
                kind, head = "__method__", [self._value(value), name]
            case function:
                kind, head = "__call__", [self._value(function)]
        given = [self._value(each) for each in node.args]
        keywords = []
        for each in node.keywords:
            if each.arg is None and not isinstance(each.value, ast.Dict):
                self.refuse(node, "** of something other than a dict in place")
            keywords.append(ast.copy_location(ast.keyword(each.arg, self._value(each.value)), each))
        return _recorded(node, kind, *head, *given, keywords=keywords)

    def _is_path(self, node: ast.expr) -> bool:
        """Whether ``node`` is read off an import or a builtin."""
        while isinstance(node, ast.Attribute):
            node = node.value
        if not isinstance(node, ast.Name) or node.id in self._bound:
            return False
        builtin = hasattr(builtins, node.id) and not node.id.startswith("__")
        return builtin or node.id in self._imports


def _is_entry(node: ast.expr, table: str) -> bool:
    """Whether ``node`` is an entry of ``__vllm_consts__`` or ``__vllm_submods__``."""
    match node:
        case ast.Subscript(ast.Name(name), ast.Constant(index)):
            return name == table and type(index) is int
    return False


def _lines(stmt: ast.stmt) -> range:
    return range(stmt.lineno, (stmt.end_lineno or stmt.lineno) + 1)


def _constant(at: ast.stmt | ast.expr, value: str | int) -> ast.Constant:
    return ast.Constant(value, lineno=at.lineno, col_offset=0)


def _recorded(
    at: ast.stmt | ast.expr, kind: str, *args: ast.expr, keywords: Sequence[ast.keyword] = ()
) -> ast.expr:
    """A call of the recorder's ``kind``."""
    function = ast.Name(kind, ast.Load(), lineno=at.lineno, col_offset=0)
    given = [_constant(at, at.lineno), *args]
    return ast.Call(function, given, [*keywords], lineno=at.lineno, col_offset=0)
