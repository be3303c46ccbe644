"""Reads an emitted module into a value: its tables, functions and statements. The text is parsed, never executed."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

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
    """The comment tables of a module: submodules and constants by index, bound names, and digests of
    what submodules compute, by name; ``banner`` is the rest of the head."""

    submods: dict[int, str] = field(default_factory=dict)
    consts: dict[int, str] = field(default_factory=dict)
    bound: dict[str, str] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    format_version: int | None = None
    banner: list[str] = field(default_factory=list)


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

    # ``piece`` (a call through ``__vllm_submods__``), ``inlined`` (a function of this module or an
    # alias), ``call`` (everything else that computes), ``return`` or ``other``
    kind: str
    callee: str  # the submodule's name, the function's path, or an operator sign
    # the names that it binds; ``unpack`` if it takes its value apart for them
    results: tuple[str, ...]
    # the operands, each with its keyword ("" by position)
    arguments: tuple[tuple[str, ast.expr], ...]
    line: int
    text: str
    comment: str = ""  # the comment lines right above it
    unpack: bool = False

    @property
    def module_path(self) -> str:
        """The part of the comment that names the module it comes from; "" when there is none."""
        lines = [line for line in self.comment.split("\n") if not line.startswith("->")]
        first = lines[-1].partition("  ")[0] if lines else ""
        return "" if ".py" in first else first

    @property
    def reads(self) -> set[str]:
        walked = (node for _, operand in self.arguments for node in ast.walk(operand))
        return {node.id for node in walked if isinstance(node, ast.Name)}


@dataclass(frozen=True, slots=True)
class FunctionOutline:
    """One function: ``parameters`` by name with their text, in order; ``deaths`` maps a name to the
    index of the step after which it is deleted."""

    name: str
    parameters: dict[str, str]
    steps: tuple[Step, ...]
    deaths: dict[str, int]
    line: int


@dataclass(frozen=True, slots=True)
class Outline:
    """A whole module; ``functions`` excludes the entry."""

    entry: FunctionOutline
    functions: dict[str, FunctionOutline]
    aliases: dict[str, str]
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
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    if not functions:
        problem = f"not a stitching source: it defines no function {ENTRY_NAME}"
        raise UsageError(problem, where=where, hint=hint)
    entry = next((node for node in functions if node.name == ENTRY_NAME), functions[-1])
    lines = text.split("\n")  # as Python counts them: a form feed ends no line
    tables = read_tables(lines)
    aliases = {
        node.targets[0].id: ast.unparse(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    imports = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    known = {node.name for node in functions} | {*aliases}
    imported = (each for node in imports for each in node.names)
    roots = known | {each.asname or each.name.partition(".")[0] for each in imported}
    reader = _FunctionReader(lines, tables.submods, known, roots)
    return Outline(
        entry=reader.read(entry),
        functions={node.name: reader.read(node) for node in functions if node is not entry},
        aliases=aliases,
        imports=tuple(map(ast.unparse, imports)),
        tables=tables,
        tree=tree,
        text=text,
    )


def _flat(body: Sequence[ast.stmt]) -> Iterator[ast.stmt | str]:
    """The statements of ``body``, regions (``try: ... finally: call``) opened, with a mark where each part begins."""
    for stmt in body:
        if isinstance(stmt, ast.Try) and not stmt.handlers and not stmt.orelse:
            yield "try:"
            yield from _flat(stmt.body)
            yield "finally:"
            yield from _flat(stmt.finalbody)
        else:
            yield stmt


@dataclass(frozen=True, slots=True)
class _FunctionReader:
    lines: list[str]
    submods: dict[int, str]
    known: set[str]
    roots: set[str]

    def read(self, node: ast.FunctionDef) -> FunctionOutline:
        steps: list[Step] = []
        deaths: dict[str, int] = {}
        for stmt in _flat(node.body):
            if isinstance(stmt, str):
                steps.append(Step("other", stmt, (), (), steps[-1].line if steps else 0, stmt))
            elif isinstance(stmt, ast.Delete):
                names = (each.id for each in stmt.targets if isinstance(each, ast.Name))
                deaths.update(dict.fromkeys(names, len(steps) - 1))
            else:
                steps.append(self._step(stmt, node.lineno))
        parameters = dict(_parameters(node.args))
        return FunctionOutline(node.name, parameters, tuple(steps), deaths, node.lineno)

    def _step(self, stmt: ast.stmt, first: int) -> Step:
        comment = self._comment_above(stmt.lineno, first)
        text = ast.unparse(stmt)
        if isinstance(stmt, ast.Return):
            returned = (("", stmt.value),) if stmt.value is not None else ()
            return Step("return", "return", (), returned, stmt.lineno, text, comment)
        results: tuple[str, ...] = ()
        unpack = False
        if isinstance(stmt, ast.Assign) and len(stmt.targets) == 1:
            target = stmt.targets[0]
            unpack = isinstance(target, (ast.Tuple, ast.List))
            parts = target.elts if isinstance(target, (ast.Tuple, ast.List)) else [target]
            results = tuple(each.id for each in parts if isinstance(each, ast.Name))
            if len(results) != len(parts):
                return Step("other", text.partition("\n")[0], (), (), stmt.lineno, text, comment)
        elif not isinstance(stmt, ast.Expr):
            return Step("other", text.partition("\n")[0], (), (), stmt.lineno, text, comment)
        kind, callee, operands = self._operation(stmt.value)
        return Step(kind, callee, results, tuple(operands), stmt.lineno, text, comment, unpack)

    def _comment_above(self, line: int, first: int) -> str:
        """The comment lines that end right above ``line`` and start below ``first``."""
        found: list[str] = []
        for number in range(line - 2, first - 1, -1):
            text = self.lines[number].strip()
            if not text.startswith("#"):
                break
            found.append(text.lstrip("#").strip())
        return "\n".join(reversed(found))

    def _operation(self, value: ast.expr) -> tuple[str, str, list[tuple[str, ast.expr]]]:
        def plain(*operands: ast.expr) -> list[tuple[str, ast.expr]]:
            return [("", each) for each in operands]

        match value:
            case ast.Call(func=func, args=args):
                operands = plain(*args) + [
                    (each.arg or "**", each.value) for each in value.keywords
                ]
                match func:
                    case ast.Subscript(value=ast.Name(id=name), slice=ast.Constant(value=int(at))):
                        if name == SUBMODS:
                            return "piece", self.submods.get(at, f"[{at}]"), operands
                    case ast.Name(id=name):
                        return "inlined" if name in self.known else "call", name, operands
                    case ast.Attribute(value=receiver, attr=method):
                        if not self._is_path(receiver):
                            return "call", f".{method}", plain(receiver) + operands
                return "call", ast.unparse(func), operands
            case ast.Subscript(value=operand, slice=index):
                return "call", "[]", plain(operand, index)
            case ast.Attribute(value=operand, attr=name):
                return "call", f".{name}", plain(operand)
            case ast.BinOp(left=left, op=sign, right=right):
                return "call", _sign(sign), plain(left, right)
            case ast.Compare(left=left, ops=[sign], comparators=[right]):
                return "call", _sign(sign), plain(left, right)
        return "call", type(value).__name__, plain(value)

    def _is_path(self, expr: ast.expr) -> bool:
        """True for ``torch.ops.aten``: a dotted path from an import or an alias, not from a value."""
        while isinstance(expr, ast.Attribute):
            expr = expr.value
        return isinstance(expr, ast.Name) and expr.id in self.roots


def _sign(sign: ast.operator | ast.cmpop) -> str:
    """The operator as it is written."""
    x = ast.Name("x", ast.Load())
    whole = ast.Compare(x, [sign], [x]) if isinstance(sign, ast.cmpop) else ast.BinOp(x, sign, x)
    return ast.unparse(whole)[1:-1].strip()


def _parameters(args: ast.arguments) -> Iterator[tuple[str, str]]:
    positional = [*args.posonlyargs, *args.args]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(args.defaults))
    for arg, default in zip(positional, [*defaults, *args.defaults], strict=True):
        note = " (by position only)" if arg in args.posonlyargs else ""
        yield arg.arg, _with_default(arg.arg, default) + note
    if args.vararg is not None:
        yield args.vararg.arg, f"*{args.vararg.arg}"
    for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True):
        yield arg.arg, _with_default(arg.arg, default) + " (by keyword only)"
    if args.kwarg is not None:
        yield args.kwarg.arg, f"**{args.kwarg.arg}"


def _with_default(name: str, default: ast.expr | None) -> str:
    return name if default is None else f"{name}={ast.unparse(default)}"
