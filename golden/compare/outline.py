"""What an emitted module says, as a value. In: the text of a stitching source. Out: an `Outline` of its tables, functions and statements.

The text is parsed, never executed, and never compared here; an edited or partly unfamiliar file still has an outline.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from piecework.errors import UsageError
from piecework.golden.compare.tables import SUBMODS, read_tables

ENTRY_NAME = "execution_fn"


@dataclass(frozen=True, slots=True)
class Step:
    """One statement.

    Attributes:
        kind: ``piece`` (a call through ``__vllm_submods__``), ``inlined`` (a function of this module or an alias: what
            stays outside the pieces), ``call`` (everything else that computes), ``delete``, ``return`` or ``other``.
        callee: the submodule's name, the function's path, an operator sign, or the first words of an ``other``.
        results: the names that the statement binds, in order; ``unpack`` if it takes its value apart for them.
        arguments: the operand expressions; ``name`` is "" for a positional one.
        line: 1-based number of its first line.
        text: the statement as the formatter of `ast` writes it.
        comment: the comment lines right above it, without ``#``.
    """

    kind: str
    callee: str
    results: tuple[str, ...]
    arguments: tuple[Argument, ...]
    line: int
    text: str
    comment: str = ""
    unpack: bool = False

    @property
    def module_path(self) -> str:
        """The part of the comment that names the module it comes from; "" when there is none."""
        lines = [line for line in self.comment.split("\n") if not line.startswith("->")]
        first = lines[-1].partition("  ")[0] if lines else ""
        return "" if ".py" in first else first


@dataclass(frozen=True, slots=True)
class Argument:
    """An operand: its keyword ("" if positional) and its expression."""

    name: str
    expr: ast.expr

    @property
    def text(self) -> str:
        text = ast.unparse(self.expr)
        return f"{self.name}={text}" if self.name else text


@dataclass(frozen=True, slots=True)
class Parameter:
    """``kind`` is ``""``, ``"/"`` (by position only), ``"keyword"``, ``"*"`` or ``"**"``; ``default`` is source text."""

    name: str
    kind: str
    default: str | None = None

    @property
    def text(self) -> str:
        star = {"*": "*", "**": "**"}.get(self.kind, "")
        return f"{star}{self.name}" + (f"={self.default}" if self.default is not None else "")


@dataclass(frozen=True, slots=True)
class FunctionOutline:
    """One function: ``deaths`` maps a name to the index of the step after which it is deleted.

    ``extras`` holds what emitted functions never have: decorators and annotations.
    """

    name: str
    parameters: tuple[Parameter, ...]
    steps: tuple[Step, ...]
    deaths: dict[str, int]
    line: int
    extras: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Outline:
    """A whole module. ``functions`` excludes the entry; ``statements`` are other module-level ones."""

    entry: FunctionOutline
    functions: dict[str, FunctionOutline]
    aliases: dict[str, str]
    imports: tuple[str, ...]
    submods: dict[int, str]
    consts: dict[int, str]
    bound: dict[str, str]
    digests: dict[str, str]
    format_version: int | None
    banner: tuple[str, ...]
    statements: tuple[str, ...] = ()
    text: str = field(default="", repr=False)


def outline_of(text: str, where: str = "source") -> Outline:
    """Parse ``text``.

    Raises:
        UsageError: it is not Python, or has no function.
    """
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError) as error:
        raise UsageError(
            f"not a stitching source: {error}",
            where=where,
            hint="pass a file that piecework emitted",
        ) from error
    lines = text.split("\n")  # as Python counts them: a form feed ends no line
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    if not functions:
        raise UsageError(
            f"not a stitching source: it defines no function {ENTRY_NAME}",
            where=where,
            hint="pass a file that piecework emitted",
        )
    entry = next((node for node in functions if node.name == ENTRY_NAME), functions[-1])
    tables = read_tables(lines)
    aliases = {name: value for node in tree.body for name, value in _alias(node)}
    known = frozenset(node.name for node in functions) | frozenset(aliases)
    roots = known | {name for node in tree.body for name in _imported(node)}
    reader = _FunctionReader(lines, tables.submods, known, roots)
    return Outline(
        entry=reader.read(entry),
        functions={node.name: reader.read(node) for node in functions if node is not entry},
        aliases=aliases,
        imports=tuple(
            ast.unparse(node)
            for node in tree.body
            if isinstance(node, (ast.Import, ast.ImportFrom))
        ),
        submods=tables.submods,
        consts=tables.consts,
        bound=tables.bound,
        digests=tables.digests,
        format_version=tables.format_version,
        banner=tables.banner,
        statements=tuple(ast.unparse(node) for node in tree.body if _is_unfamiliar(node)),
        text=text,
    )


# --- the module -----------------------------------------------------------------------------------


def _alias(node: ast.stmt) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.Assign) and len(node.targets) == 1:
        target = node.targets[0]
        if isinstance(target, ast.Name):
            yield target.id, ast.unparse(node.value)


def _imported(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        for each in node.names:
            yield each.asname or each.name.partition(".")[0]


def _is_unfamiliar(node: ast.stmt) -> bool:
    if isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef)):
        return False
    return not list(_alias(node))


# --- functions and statements ----------------------------------------------------------------------


def _flat(body: Sequence[ast.stmt]) -> Iterator[ast.stmt | str]:
    """The statements of ``body`` in order, regions (``try: ... finally: call``) opened, with a mark where each part begins."""
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
    known: frozenset[str]
    roots: frozenset[str]

    def read(self, node: ast.FunctionDef) -> FunctionOutline:
        steps: list[Step] = []
        deaths: dict[str, int] = {}
        for stmt in _flat(node.body):
            if isinstance(stmt, str):
                steps.append(Step("other", stmt, (), (), steps[-1].line if steps else 0, stmt, ""))
                continue
            if isinstance(stmt, ast.Delete):
                names = [t.id for t in stmt.targets if isinstance(t, ast.Name)]
                if len(names) == len(stmt.targets):
                    # A name that is bound again later dies at its last deletion.
                    deaths.update(dict.fromkeys(names, len(steps) - 1))
                    continue
            steps.append(self._step(stmt, node.lineno))
        parameters = tuple(_parameters(node.args))
        annotated = [arg.annotation for arg in ast.walk(node.args) if isinstance(arg, ast.arg)]
        extras = [*node.decorator_list, *annotated, node.returns]
        return FunctionOutline(
            node.name,
            parameters,
            tuple(steps),
            deaths,
            node.lineno,
            tuple(ast.unparse(each) for each in extras if each is not None),
        )

    def _comment_above(self, line: int, stop: int) -> str:
        """The block of comment lines that ends right above ``line`` and starts below ``stop`` (both 1-based)."""
        found: list[str] = []
        for number in range(line - 2, stop - 1, -1):
            text = self.lines[number].strip()
            if not text.startswith("#"):
                break
            found.append(text.lstrip("#").strip())
        return "\n".join(reversed(found))

    def _step(self, stmt: ast.stmt, def_line: int) -> Step:
        results, value = _binding(stmt)
        comment = self._comment_above(stmt.lineno, def_line)
        text = ast.unparse(stmt)
        if isinstance(stmt, ast.Return):
            returned = (Argument("", stmt.value),) if stmt.value is not None else ()
            return Step("return", "return", (), returned, stmt.lineno, text, comment)
        if value is None:
            return Step("other", text.partition("\n")[0], (), (), stmt.lineno, text, comment)
        kind, callee, arguments = self._operation(value)
        unpack = isinstance(stmt, ast.Assign) and not isinstance(stmt.targets[0], ast.Name)
        return Step(kind, callee, results, tuple(arguments), stmt.lineno, text, comment, unpack)

    def _operation(self, value: ast.expr) -> tuple[str, str, list[Argument]]:
        match value:
            case ast.Call(func=ast.Subscript(value=ast.Name(id=name), slice=ast.Constant(value=i))):
                if name == SUBMODS and isinstance(i, int):
                    return "piece", self.submods.get(i, f"[{i}]"), _arguments(value)
                return "call", ast.unparse(value.func), _arguments(value)
            case ast.Call(func=ast.Name(id=name)):
                kind = "inlined" if name in self.known else "call"
                return kind, name, _arguments(value)
            case ast.Call(func=ast.Attribute(value=receiver, attr=method) as func):
                if self._is_path(receiver):
                    return "call", ast.unparse(func), _arguments(value)
                return "call", f".{method}", [Argument("", receiver), *_arguments(value)]
            case ast.Call():
                return "call", ast.unparse(value.func), _arguments(value)
            case ast.Subscript(value=operand, slice=index):
                return "call", "[]", [Argument("", operand), Argument("", index)]
            case ast.Attribute(value=operand, attr=name):
                return "call", f".{name}", [Argument("", operand)]
            case ast.BinOp(left=left, op=sign, right=right):
                return "call", _sign(sign), [Argument("", left), Argument("", right)]
            case ast.Compare(left=left, ops=[sign], comparators=[right]):
                return "call", _sign(sign), [Argument("", left), Argument("", right)]
            case ast.UnaryOp(op=sign, operand=operand):
                return "call", _sign(sign), [Argument("", operand)]
            case _:
                return "call", type(value).__name__, [Argument("", value)]

    def _is_path(self, expr: ast.expr) -> bool:
        """True for ``torch.ops.aten``: a dotted path that starts at an import or an alias, not at a local value."""
        while isinstance(expr, ast.Attribute):
            expr = expr.value
        return isinstance(expr, ast.Name) and expr.id in self.roots


def _sign(sign: ast.operator | ast.cmpop | ast.unaryop) -> str:
    """The operator as it is written; a prefix operator has a space before it, so that it is not its infix twin."""
    operand = ast.Name("x", ast.Load())
    if isinstance(sign, ast.unaryop):
        return f" {ast.unparse(ast.UnaryOp(sign, operand))[:-1].strip()}"
    if isinstance(sign, ast.cmpop):
        return ast.unparse(ast.Compare(operand, [sign], [operand]))[1:-1].strip()
    return ast.unparse(ast.BinOp(operand, sign, operand))[1:-1].strip()


def _binding(stmt: ast.stmt) -> tuple[tuple[str, ...], ast.expr | None]:
    """The names that ``stmt`` binds and the expression it evaluates; None for anything but a simple statement."""
    if isinstance(stmt, ast.Expr):
        return (), stmt.value
    if isinstance(stmt, ast.Assign) and len(stmt.targets) == 1:
        target = stmt.targets[0]
        elements = target.elts if isinstance(target, (ast.Tuple, ast.List)) else [target]
        if all(isinstance(each, ast.Name) for each in elements):
            return tuple(each.id for each in elements if isinstance(each, ast.Name)), stmt.value
    return (), None


def _arguments(call: ast.Call) -> list[Argument]:
    named = [Argument(each.arg or "**", each.value) for each in call.keywords]
    return [*(Argument("", each) for each in call.args), *named]


def _parameters(args: ast.arguments) -> Iterator[Parameter]:
    positional = [*args.posonlyargs, *args.args]
    missing = len(positional) - len(args.defaults)
    for index, arg in enumerate(positional):
        default = args.defaults[index - missing] if index >= missing else None
        kind = "/" if index < len(args.posonlyargs) else ""
        yield Parameter(arg.arg, kind, None if default is None else ast.unparse(default))
    if args.vararg is not None:
        yield Parameter(args.vararg.arg, "*")
    for arg, keyword_default in zip(args.kwonlyargs, args.kw_defaults, strict=True):
        text = None if keyword_default is None else ast.unparse(keyword_default)
        yield Parameter(arg.arg, "keyword", text)
    if args.kwarg is not None:
        yield Parameter(args.kwarg.arg, "**")
