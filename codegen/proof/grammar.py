"""The language of emitted modules, as an allow-list. In: emitted or edited text. Out: its syntax tree, or an `EmitError` that names the line.

Every kind of node that may occur is in one table, with each field that may hold something and what may stand there; whatever is not
listed is refused. What the text does is for `trace_text`; nothing of it is executed here.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn

from piecework.codegen.graph.targets import ENTRY_NAME
from piecework.codegen.plan.names import SUBMODS
from piecework.errors import EmitError

#: How deep nodes may be nested: what `lower` writes stays well below, and Python's own limits are above.
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


class _Kinds(NamedTuple):
    """The kinds of nodes that may stand somewhere; ``of`` says where, for errors."""

    of: str
    kinds: tuple[type[ast.AST], ...]


_PLAIN = _Kinds("", ())  # a name, a value or a sign: what it means is for `trace_text`
_EXPRESSION = _Kinds(
    "expressions",
    (
        *(ast.Name, ast.Constant, ast.Attribute, ast.Subscript, ast.Tuple, ast.List, ast.Dict),
        *(ast.Call, ast.UnaryOp, ast.BinOp, ast.Compare),
    ),
)
_INDEX = _Kinds("expressions", (*_EXPRESSION.kinds, ast.Slice))
_STATEMENT = _Kinds("functions", (ast.Assign, ast.Expr, ast.Delete, ast.Return, ast.Try))
_TARGET = _Kinds("assignments", (ast.Name, ast.Tuple))
_ARGUMENT = _Kinds("signatures", (ast.arg,))

# Each kind of node with its fields that may hold something; all others, also those that a later Python adds, must be empty.
_LANGUAGE: Mapping[type[ast.AST], Mapping[str, _Kinds]] = {
    ast.Module: {"body": _Kinds("modules", (ast.Import, ast.Assign, ast.FunctionDef))},
    ast.Import: {"names": _Kinds("imports", (ast.alias,))},
    ast.alias: {"name": _PLAIN},
    ast.FunctionDef: {
        "name": _PLAIN,
        "args": _Kinds("signatures", (ast.arguments,)),
        "body": _STATEMENT,
    },
    ast.arguments: {
        **dict.fromkeys(("args", "vararg", "kwonlyargs", "kwarg"), _ARGUMENT),
        **{"kw_defaults": _PLAIN, "defaults": _EXPRESSION},
    },
    ast.arg: {"arg": _PLAIN},
    ast.Assign: {"targets": _TARGET, "value": _EXPRESSION},
    ast.Expr: {"value": _EXPRESSION},
    ast.Delete: {"targets": _TARGET},
    ast.Return: {"value": _EXPRESSION},
    ast.Try: {
        "body": _Kinds("functions", (*_STATEMENT.kinds, ast.Pass)),
        "finalbody": _Kinds("finally clauses", (ast.Expr,)),
    },
    ast.Pass: {},
    ast.Name: {"id": _PLAIN, "ctx": _PLAIN},
    ast.Constant: {"value": _PLAIN, "kind": _PLAIN},
    ast.Attribute: {"value": _EXPRESSION, "attr": _PLAIN, "ctx": _PLAIN},
    ast.Subscript: {"value": _EXPRESSION, "slice": _INDEX, "ctx": _PLAIN},
    ast.Slice: dict.fromkeys(("lower", "upper", "step"), _EXPRESSION),
    ast.Tuple: {"elts": _INDEX, "ctx": _PLAIN},  # Python itself has slices in an index only
    ast.List: {"elts": _EXPRESSION, "ctx": _PLAIN},
    ast.Dict: {"keys": _EXPRESSION, "values": _EXPRESSION},
    ast.Call: {
        **{"func": _EXPRESSION, "args": _EXPRESSION},
        "keywords": _Kinds("calls", (ast.keyword,)),
    },
    ast.keyword: {"arg": _PLAIN, "value": _EXPRESSION},
    ast.UnaryOp: {"op": _PLAIN, "operand": _EXPRESSION},
    ast.BinOp: {"left": _EXPRESSION, "op": _PLAIN, "right": _EXPRESSION},
    ast.Compare: {"left": _EXPRESSION, "ops": _PLAIN, "comparators": _EXPRESSION},
}
# Most nodes are of these kinds: they stand for expressions alone, and there is nothing in them to look at.
_LEAVES = {kind for kind in (ast.Name, ast.Constant) if _LANGUAGE[kind].keys() >= {*kind._fields}}
_COMPARISONS = (ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE)
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


def check_grammar(code: str, tree: ast.Module) -> None:
    """Check that ``tree`` (parsed from ``code``) is made of nothing but what emitted modules are made of.

    Raises:
        EmitError: the first node or field that is not; names its line.
    """
    grammar = _Grammar(code)
    grammar.node(tree, tree, 0)
    grammar.bound_once(tree)


class _Grammar:
    """One text."""

    def __init__(self, code: str) -> None:
        self.code = code

    def refuse(self, at: ast.AST, why: str) -> NoReturn:
        line = getattr(at, "lineno", 0)
        raise EmitError(why, where=line_at(self.code, line) if line else None)

    def node(self, node: ast.AST, at: ast.AST, depth: int) -> None:
        """Check a node of a kind that may stand where it does, with everything in it; ``at`` has a line for errors."""
        kind = type(node)
        if depth > MAX_DEPTH:
            self.refuse(at, _TOO_DEEP)
        if kind in _RULES:
            _RULES[kind](self, node)
        known = _LANGUAGE[kind]
        for name in node._fields:
            value, allowed = getattr(node, name, None), known.get(name)
            if allowed is _PLAIN or value is None or value == []:
                continue
            if allowed is None:
                what = _WORDS.get(name) or f"{name.replace('_', ' ')} is"
                self.refuse(at, f"{what} not part of emitted modules")
            for each in value if type(value) is list else (value,):
                child = type(each)
                if child in _LEAVES:
                    continue
                place = each if hasattr(each, "lineno") else at
                if child not in allowed.kinds:
                    self.refuse(place, f"{child.__name__} is not part of emitted {allowed.of}")
                self.node(each, place, depth + 1)

    def bound_once(self, tree: ast.Module) -> None:
        """What module level binds is one name in each statement, and each name once."""
        names: set[str] = set()
        for stmt in tree.body:
            bound = getattr(stmt, "name", None)
            if isinstance(stmt, ast.Assign):
                bound = getattr(stmt.targets[0], "id", None)
                if bound is None:
                    self.refuse(stmt, "one name is assigned to at module level")
            if bound in names:
                self.refuse(stmt, f"{bound!a} is bound twice at module level")
            names |= {bound} if bound else set()

    # --- what the table does not say ---------------------------------------------------------------

    def own_name(self, node: ast.AST, name: str) -> None:
        if name.startswith("__"):
            self.refuse(
                node,
                f"{name!a} is a name of Python's or of the emitted module, which no text may bind",
            )

    def function(self, function: ast.FunctionDef) -> None:
        self.own_name(function, function.name)
        arguments = function.args
        named = [*arguments.args, *filter(None, (arguments.vararg, arguments.kwarg))]
        for each in named:
            self.own_name(each, each.arg)
        if len({each.arg for each in named}) != len(named):
            self.refuse(function, "two parameters have one name")
        if [each.arg for each in arguments.kwonlyargs] not in ([], [SUBMODS]):
            self.refuse(function, f"the only keyword-only parameter is {SUBMODS}")
        if any(default is not None for default in arguments.kw_defaults):
            self.refuse(function, f"{SUBMODS} has no default")
        if arguments.defaults and function.name != ENTRY_NAME:
            self.refuse(function, f"only {ENTRY_NAME} has parameters with a default")

    def assign(self, stmt: ast.Assign) -> None:
        if len(stmt.targets) != 1:
            self.refuse(stmt, "only one target is assigned to")
        for name in self.targets(stmt, stmt.targets, "only names are assigned to"):
            self.own_name(stmt, name.id)

    def delete(self, stmt: ast.Delete) -> None:
        self.targets(stmt, stmt.targets, "only names are deleted")

    def targets(self, stmt: ast.stmt, targets: list[ast.expr], why: str) -> list[ast.Name]:
        """The names that ``targets`` are, or one tuple of names holds."""
        if len(targets) == 1 and isinstance(targets[0], ast.Tuple):
            targets = targets[0].elts
        names = [each for each in targets if isinstance(each, ast.Name)]
        if len(names) != len(targets):
            self.refuse(stmt, why)
        return names

    def try_(self, stmt: ast.Try) -> None:
        """``try: ... finally: exit(...)``: a region that is closed whatever happens in it."""
        last = stmt.finalbody[0] if len(stmt.finalbody) == 1 else None
        if not isinstance(getattr(last, "value", None), ast.Call):
            self.refuse(stmt, "finally does something else than one call")
        if len(stmt.body) != 1 and any(isinstance(each, ast.Pass) for each in stmt.body):
            self.refuse(stmt, "Pass is not part of emitted functions")

    def dict_(self, node: ast.Dict) -> None:
        if None in node.keys:
            self.refuse(node, "** in a dict is not part of emitted expressions")

    def keyword(self, node: ast.keyword) -> None:
        if node.arg is None and not isinstance(node.value, ast.Dict):
            self.refuse(node, "** of something other than a dict in place")

    def compare(self, node: ast.Compare) -> None:
        if len(node.ops) != 1 or not isinstance(node.ops[0], _COMPARISONS):
            self.refuse(node, "this comparison is not part of emitted expressions")


_RULES: Mapping[type[ast.AST], Callable[[_Grammar, Any], None]] = {
    ast.FunctionDef: _Grammar.function,
    ast.Assign: _Grammar.assign,
    ast.Delete: _Grammar.delete,
    ast.Try: _Grammar.try_,
    ast.Dict: _Grammar.dict_,
    ast.keyword: _Grammar.keyword,
    ast.Compare: _Grammar.compare,
}
