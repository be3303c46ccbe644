"""Reads an emitted module into a value: its tables, functions and statements."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from piecework.errors import UsageError

ENTRY_NAME = "execution_fn"
SUBMODS = "__vllm_submods__"
CONSTS = "__vllm_consts__"

_FORMAT = re.compile(r"^# piecework .*\bformat (\d+)")
_TABLE = re.compile(r"^# (__vllm_submods__|__vllm_consts__):$")
_ROW = re.compile(r"^#\s+\[(\d+)\] (.*)$")
_BOUND = re.compile(r"^#\s+(\w+): (.*)$")


@dataclass(slots=True)
class Tables:
    """The comment tables of a module."""

    submods: dict[int, str] = field(default_factory=dict)
    consts: dict[int, str] = field(default_factory=dict)
    bound: dict[str, str] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)  # of what submodules compute, by name
    format_version: int | None = None
    banner: list[str] = field(default_factory=list)  # the rest of the head


def read_tables(lines: Sequence[str]) -> Tables:
    """Read the tables at the head and the bound names at the foot."""
    tables = Tables()
    current: dict[int, str] | None = None
    for line in lines:
        if not line.startswith("#"):
            break
        if found := _FORMAT.match(line):
            tables.format_version = int(found[1])
        elif found := _TABLE.match(line):
            current = tables.submods if found[1] == SUBMODS else tables.consts
        elif current is not None and (found := _ROW.match(line)):
            row, _, digest = found[2].partition("  ")
            if current is tables.submods and digest:
                tables.digests[row] = digest
            current[int(found[1])] = row if current is tables.submods else found[2]
        elif current is None and line != "#":
            tables.banner.append(line[2:])
    starts = [at for at, line in enumerate(lines) if line.startswith("# Bound names")]
    for line in lines[starts[0] :] if starts else ():
        if found := _BOUND.match(line):
            tables.bound[found[1]] = found[2]
    return tables


@dataclass(frozen=True, slots=True)
class Step:
    """One statement."""

    kind: str  # piece, call, value (everything else that computes), return or other
    callee: str  # the submodule's name, or the function as it is written
    target: ast.expr | None  # what it binds
    operands: tuple[tuple[str, ast.expr], ...]  # each with its keyword, "" by position
    line: int
    text: str
    comment: str = ""  # the comment lines right above it

    @property
    def results(self) -> list[str]:
        nodes = [] if self.target is None else ast.walk(self.target)
        return [node.id for node in nodes if isinstance(node, ast.Name)]

    @property
    def module_path(self) -> str:
        """The part of the comment that names the module it comes from; "" when there is none."""
        lines = [line for line in self.comment.split("\n") if not line.startswith("->")]
        first = lines[-1].partition("  ")[0] if lines else ""
        return "" if ".py" in first else first


@dataclass(frozen=True, slots=True)
class FunctionOutline:
    """One function."""

    name: str
    parameters: tuple[str, ...]
    signature: str
    steps: tuple[Step, ...]
    deaths: dict[str, int]  # a name → the index of the step after which it is deleted
    line: int


@dataclass(frozen=True, slots=True)
class Outline:
    """A whole module."""

    entry: FunctionOutline
    functions: dict[str, FunctionOutline]  # the others
    aliases: dict[str, ast.expr]
    imports: tuple[str, ...]
    tables: Tables
    tree: ast.Module = field(repr=False)
    text: str = field(repr=False)


def outline_of(text: str, where: str = "source") -> Outline:
    """Parse ``text``.

    Raises:
        UsageError: it is not Python, or has no function.
    """
    hint = "pass a file that piecework emitted"
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError) as error:
        raise UsageError(f"not a stitching source: {error}", where=where, hint=hint) from error
    nodes = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    if not nodes:
        problem = f"not a stitching source: it defines no function {ENTRY_NAME}"
        raise UsageError(problem, where=where, hint=hint)
    lines = text.split("\n")  # as Python counts them: a form feed ends no line
    tables = read_tables(lines)
    functions = {node.name: _function(node, lines, tables) for node in nodes}
    entry = functions.pop(ENTRY_NAME if ENTRY_NAME in functions else nodes[-1].name)
    aliases = {
        node.targets[0].id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    imports = (node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom)))
    return Outline(entry, functions, aliases, tuple(map(ast.unparse, imports)), tables, tree, text)


def _function(node: ast.FunctionDef, lines: Sequence[str], tables: Tables) -> FunctionOutline:
    steps: list[Step] = []
    deaths: dict[str, int] = {}
    for stmt in _flat(node.body):
        if isinstance(stmt, str):
            steps.append(Step("other", stmt, None, (), steps[-1].line if steps else 0, stmt))
        elif isinstance(stmt, ast.Delete):
            names = (each.id for each in stmt.targets if isinstance(each, ast.Name))
            deaths.update(dict.fromkeys(names, len(steps) - 1))
        else:
            steps.append(_step(stmt, _comment_above(stmt.lineno, node.lineno, lines), tables))
    parameters = tuple(each.arg for each in ast.walk(node.args) if isinstance(each, ast.arg))
    signature = ast.unparse(node.args)
    return FunctionOutline(node.name, parameters, signature, tuple(steps), deaths, node.lineno)


def _flat(body: Sequence[ast.stmt]) -> Iterator[ast.stmt | str]:
    """The statements of ``body``, regions opened, with a mark where each part begins."""
    for stmt in body:
        if isinstance(stmt, ast.Try) and not stmt.handlers and not stmt.orelse:
            yield "try:"
            yield from _flat(stmt.body)
            yield "finally:"
            yield from _flat(stmt.finalbody)
        else:
            yield stmt


def _comment_above(line: int, first: int, lines: Sequence[str]) -> str:
    """The comment lines that end right above ``line`` and start below ``first``."""
    above = (text.strip() for text in reversed(lines[first : line - 1]))
    found = [text.lstrip("#").strip() for text in takewhile(lambda text: text[:1] == "#", above)]
    return "\n".join(reversed(found))


def _step(stmt: ast.stmt, comment: str, tables: Tables) -> Step:
    line, text = stmt.lineno, ast.unparse(stmt)
    match stmt:
        case ast.Return(value=value):
            operands = () if value is None else (("", value),)
            return Step("return", "return", None, operands, line, text, comment)
        case ast.Assign(targets=[target], value=value):
            pass
        case ast.Expr(value=value):
            target = None
        case _:
            return Step("other", text.partition("\n")[0], None, (), line, text, comment)
    if not isinstance(value, ast.Call):
        return Step("value", "", target, (("", value),), line, text, comment)
    kind, callee = "call", ast.unparse(value.func)
    match value.func:
        case ast.Subscript(value=ast.Name(id="__vllm_submods__"), slice=ast.Constant(value=at)):
            kind, callee = "piece", tables.submods.get(at, f"[{at}]")
    operands = tuple(("", each) for each in value.args)
    operands += tuple((each.arg or "**", each.value) for each in value.keywords)
    return Step(kind, callee, target, operands, line, text, comment)
