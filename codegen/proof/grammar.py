"""The language of emitted modules, as an allow-list. In: emitted or edited text. Out: its syntax tree, or an `EmitError` that names the line.

Every kind of node that may occur is listed with every one of its fields, in each position that it may have; whatever is not
listed is refused. What the text does is for `trace_text`; nothing of it is executed here.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence

from piecework.codegen.graph.targets import ENTRY_NAME
from piecework.codegen.plan.names import SUBMODS
from piecework.errors import EmitError

#: How deep expressions and blocks may be nested: what `lower` writes stays well below, and Python's own limits are above.
MAX_DEPTH = 100

_TOO_DEEP = "the text is nested too deeply"


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
        raise EmitError(f"{what} is not Python: {_TOO_DEEP} for its parser") from error


def line_at(code: str, line: int) -> str:
    """Where an error is: the number of a line, and its text."""
    lines = code.splitlines()
    return f"line {line}: {lines[line - 1].strip() if 0 < line <= len(lines) else ''}"


def check_grammar(code: str, tree: ast.Module) -> None:
    """Check that ``tree`` (parsed from ``code``) is made of nothing but what emitted modules are made of.

    Raises:
        EmitError: the first node or field that is not; names its line.
    """
    _Grammar(code).module(tree)


class _Grammar:
    """One text, and the names that its module level has bound so far."""

    def __init__(self, code: str) -> None:
        self.code = code
        self.names: set[str] = set()

    def error(self, node: ast.AST, why: str) -> EmitError:
        line = getattr(node, "lineno", 0)
        return EmitError(why, where=line_at(self.code, line) if line else None)

    def require(self, holds: bool, node: ast.AST, why: str) -> None:
        if not holds:
            raise self.error(node, why)

    # --- module level ------------------------------------------------------------------------------

    def module(self, tree: ast.Module) -> None:
        self.fields(tree, ("body", "type_ignores"))
        self.require(not tree.type_ignores, tree, "type comments are not part of emitted modules")
        if _GROWN:
            for node in ast.walk(tree):
                self.fields(node, _FIELDS.get(type(node), node._fields))
        for stmt in tree.body:
            check = _MODULE.get(type(stmt))
            if check is None:
                raise self.error(stmt, f"{type(stmt).__name__} is not part of emitted modules")
            check(self, stmt)

    def fields(self, node: ast.AST, known: Sequence[str], at: ast.AST | None = None) -> None:
        """What is in fields that this language does not know must be empty, also in one that a later Python adds."""
        for name in node._fields:
            if name not in known and (value := getattr(node, name, None)) is not None:
                what = _WORDS.get(name, name.replace("_", " "))
                self.require(value == [], at or node, f"{what} not part of emitted modules")

    def import_(self, stmt: ast.Import) -> None:
        self.fields(stmt, ("names",))
        for each in stmt.names:
            self.fields(each, ("name",))  # no asname

    def bound_once(self, stmt: ast.stmt, name: str) -> None:
        self.own_name(stmt, name)
        self.require(name not in self.names, stmt, f"{name!a} is bound twice at module level")
        self.names.add(name)

    def own_name(self, node: ast.AST, name: str) -> None:
        self.require(
            not name.startswith("__"),
            node,
            f"{name!a} is a name of Python's or of the emitted module, which no text may bind",
        )

    def alias(self, stmt: ast.Assign) -> None:
        self.fields(stmt, ("targets", "value"))
        target = stmt.targets[0]
        if len(stmt.targets) != 1 or type(target) is not ast.Name:
            raise self.error(stmt, "one name is assigned to at module level")
        self.bound_once(stmt, target.id)
        self.expression(stmt.value, 1)

    def function(self, function: ast.FunctionDef) -> None:
        known = ("name", "args", "body")  # no decorators, annotations, type parameters
        self.fields(function, known)
        self.bound_once(function, function.name)
        self.arguments(function)
        self.block(function.body, 1)

    def arguments(self, function: ast.FunctionDef) -> None:
        arguments = function.args
        known = ("args", "vararg", "kwonlyargs", "kw_defaults", "kwarg", "defaults")
        self.fields(arguments, known, at=function)
        named = [*arguments.args, *filter(None, (arguments.vararg, arguments.kwarg))]
        for each in (*named, *arguments.kwonlyargs):
            self.fields(each, ("arg",))  # no annotation
        for each in named:
            self.own_name(each, each.arg)
        names = {each.arg for each in named}
        self.require(len(names) == len(named), function, "two parameters have one name")
        if [each.arg for each in arguments.kwonlyargs] not in ([], [SUBMODS]):
            raise self.error(function, f"the only keyword-only parameter is {SUBMODS}")
        if any(default is not None for default in arguments.kw_defaults):
            raise self.error(function, f"{SUBMODS} has no default")
        if arguments.defaults and function.name != ENTRY_NAME:
            raise self.error(function, f"only {ENTRY_NAME} has parameters with a default")
        for default in arguments.defaults:
            self.expression(default, 1)

    # --- statements --------------------------------------------------------------------------------

    def block(self, body: Sequence[ast.stmt], depth: int) -> None:
        for stmt in body:
            check = _STATEMENTS.get(type(stmt))
            if check is None:
                raise self.error(stmt, f"{type(stmt).__name__} is not part of emitted functions")
            check(self, stmt, depth)

    def assign(self, stmt: ast.Assign, depth: int) -> None:
        if stmt.type_comment is not None or len(stmt.targets) != 1:
            raise self.error(stmt, "only one target is assigned to")
        target = stmt.targets[0]
        names = target.elts if type(target) is ast.Tuple else stmt.targets
        for each in names:
            if type(each) is not ast.Name:
                raise self.error(stmt, "only names are assigned to")
            if each.id.startswith("__"):
                self.own_name(each, each.id)
        self.expression(stmt.value, depth)

    def bare(self, stmt: ast.Expr, depth: int) -> None:
        self.expression(stmt.value, depth)

    def delete(self, stmt: ast.Delete, depth: int) -> None:
        targets = stmt.targets
        if len(targets) == 1 and type(targets[0]) is ast.Tuple:
            targets = targets[0].elts
        for each in targets:
            if type(each) is not ast.Name:
                raise self.error(stmt, "only names are deleted")

    def return_(self, stmt: ast.Return, depth: int) -> None:
        """A function's last statement; `trace_text` refuses another one."""
        if stmt.value is not None:
            self.expression(stmt.value, depth)

    def try_(self, stmt: ast.Try, depth: int) -> None:
        """``try: ... finally: exit(...)``: a region that is closed whatever happens in it."""
        self.fields(stmt, ("body", "finalbody"))  # no handlers, no else
        if depth > MAX_DEPTH:
            raise self.error(stmt, _TOO_DEEP)
        last = stmt.finalbody[0] if len(stmt.finalbody) == 1 else None
        if type(last) is not ast.Expr or type(last.value) is not ast.Call:
            raise self.error(stmt, "finally does something else than one call")
        if len(stmt.body) != 1 or type(stmt.body[0]) is not ast.Pass:
            self.block(stmt.body, depth + 1)
        self.bare(last, depth + 1)

    # --- expressions -------------------------------------------------------------------------------

    def expression(self, node: ast.expr, depth: int) -> None:
        check = _EXPRESSIONS.get(type(node))
        if check is None:
            raise self.error(node, f"{type(node).__name__} is not part of emitted expressions")
        if depth > MAX_DEPTH:
            raise self.error(node, _TOO_DEEP)
        check(self, node, depth + 1)

    def expressions(self, nodes: Sequence[ast.expr], depth: int) -> None:
        known = _LEAVES
        for node in nodes:
            if type(node) not in known:  # most are names and constants
                self.expression(node, depth)

    def leaf(self, node: ast.expr, depth: int) -> None:
        pass  # a name or a constant: what it may mean is for `trace_expr`

    def attribute(self, node: ast.Attribute, depth: int) -> None:
        self.expressions((node.value,), depth)

    def subscript(self, node: ast.Subscript, depth: int) -> None:
        index = node.slice
        self.expressions((node.value,), depth)
        for each in index.elts if type(index) is ast.Tuple else (index,):
            if type(each) is ast.Slice:
                parts = (each.lower, each.upper, each.step)
                self.expressions([part for part in parts if part is not None], depth)
            else:
                self.expressions((each,), depth)

    def sequence(self, node: ast.Tuple | ast.List, depth: int) -> None:
        self.expressions(node.elts, depth)

    def dict_(self, node: ast.Dict, depth: int) -> None:
        for key in node.keys:
            if key is None:
                raise self.error(node, "** in a dict is not part of emitted expressions")
            self.expressions((key,), depth)
        self.expressions(node.values, depth)

    def call(self, node: ast.Call, depth: int) -> None:
        if type(node.func) is not ast.Name:
            self.expression(node.func, depth)
        self.expressions(node.args, depth)
        for keyword in node.keywords:
            if keyword.arg is not None:
                self.expressions((keyword.value,), depth)
                continue
            if type(keyword.value) is not ast.Dict:
                raise self.error(node, "** of something other than a dict in place")
            self.dict_(keyword.value, depth)

    def unary(self, node: ast.UnaryOp, depth: int) -> None:
        self.expressions((node.operand,), depth)

    def binary(self, node: ast.BinOp, depth: int) -> None:
        self.expressions((node.left, node.right), depth)

    def compare(self, node: ast.Compare, depth: int) -> None:
        if len(node.ops) != 1 or type(node.ops[0]) not in _COMPARISONS:
            raise self.error(node, "this comparison is not part of emitted expressions")
        self.expressions((node.left, *node.comparators), depth)


_WORDS = {
    "asname": "import ... as is",
    "annotation": "annotations are",
    "returns": "annotations are",
    "decorator_list": "decorators are",
    "posonlyargs": "positional-only parameters are",
    "type_params": "type parameters are",
    "handlers": "except clauses are",
    "orelse": "else clauses are",
}
_LEAVES = frozenset({ast.Name, ast.Constant})
_COMPARISONS = frozenset({ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE})

# What may stand at module level, in a function, and in an expression: nothing else may.
_MODULE: dict[type[ast.stmt], Callable[..., None]] = {
    ast.Import: _Grammar.import_,
    ast.Assign: _Grammar.alias,
    ast.FunctionDef: _Grammar.function,
}
_STATEMENTS: dict[type[ast.stmt], Callable[..., None]] = {
    ast.Assign: _Grammar.assign,
    ast.Expr: _Grammar.bare,
    ast.Delete: _Grammar.delete,
    ast.Return: _Grammar.return_,
    ast.Try: _Grammar.try_,
}
_EXPRESSIONS: dict[type[ast.expr], Callable[..., None]] = {
    ast.Name: _Grammar.leaf,
    ast.Constant: _Grammar.leaf,
    ast.Attribute: _Grammar.attribute,
    ast.Subscript: _Grammar.subscript,
    ast.Tuple: _Grammar.sequence,
    ast.List: _Grammar.sequence,
    ast.Dict: _Grammar.dict_,
    ast.Call: _Grammar.call,
    ast.UnaryOp: _Grammar.unary,
    ast.BinOp: _Grammar.binary,
    ast.Compare: _Grammar.compare,
}

# Every field of every node above; a Python that has more of them is looked at field by field.
_FIELDS: dict[type[ast.AST], tuple[str, ...]] = {
    ast.Module: ("body", "type_ignores"),
    ast.Import: ("names",),
    ast.alias: ("name", "asname"),
    ast.FunctionDef: (
        *("name", "args", "body", "decorator_list", "returns", "type_comment", "type_params"),
    ),
    ast.arguments: (
        *("posonlyargs", "args", "vararg", "kwonlyargs", "kw_defaults", "kwarg", "defaults"),
    ),
    ast.arg: ("arg", "annotation", "type_comment"),
    ast.Assign: ("targets", "value", "type_comment"),
    ast.Expr: ("value",),
    ast.Delete: ("targets",),
    ast.Return: ("value",),
    ast.Try: ("body", "handlers", "orelse", "finalbody"),
    ast.Pass: (),
    ast.Name: ("id", "ctx"),
    ast.Constant: ("value", "kind"),
    ast.Attribute: ("value", "attr", "ctx"),
    ast.Subscript: ("value", "slice", "ctx"),
    ast.Slice: ("lower", "upper", "step"),
    ast.Tuple: ("elts", "ctx"),
    ast.List: ("elts", "ctx"),
    ast.Dict: ("keys", "values"),
    ast.Call: ("func", "args", "keywords"),
    ast.keyword: ("arg", "value"),
    ast.UnaryOp: ("op", "operand"),
    ast.BinOp: ("left", "op", "right"),
    ast.Compare: ("left", "ops", "comparators"),
}
_GROWN = any(set(kind._fields) - set(known) for kind, known in _FIELDS.items())
