"""Text of statements, laid out as black would. In: one statement of the plan. Out: its lines, black's own form, mostly without calling black.

Black takes over a millisecond a statement. Nearly all statements are of few forms whose layout is known: they are written
in it directly, and only the rest goes through black, in one call (`Layout.finish`). Nothing here decides what a statement says.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from typing import TypeAlias, assert_never

import black
from black.mode import TargetVersion

from piecework.codegen import ir
from piecework.codegen.literals import kind_of, literal_text
from piecework.codegen.names import is_identifier
from piecework.errors import EmitError

LINE_LENGTH = 100
BODY_INDENT = 4
MODE = black.Mode(line_length=LINE_LENGTH, target_versions={TargetVersion.PY311})


def numbered(text: str) -> str:
    """``text`` with line numbers, for error messages."""
    lines = text.splitlines()
    width = len(str(len(lines)))
    return "\n".join(f"{number:>{width}} | {line}" for number, line in enumerate(lines, 1))


def format_source(text: str) -> str:
    """``text`` as black formats it; `EmitError` with numbered lines if it is not Python."""
    try:
        return black.format_str(text, mode=MODE)
    except ValueError as error:  # black.InvalidInput; some releases do not export it
        raise EmitError(
            f"emitted source is not Python: {error}\n{numbered(text)}",
            hint="please report this with the graph that was lowered",
        ) from error


def format_statements(statements: Sequence[str], depth: int = 0) -> list[str]:
    """Each statement as black lays it out in a function's body, without its indentation; one call of black for all.

    ``depth`` is the number of blocks around them in that body.
    """
    if not statements:
        return []
    indent = BODY_INDENT + 4 * depth
    heads = "".join(f"{' ' * (4 * level)}if block:\n" for level in range(1, depth + 1))
    body = "".join(f"{' ' * indent}{each}\n" for each in statements)
    text = format_source(f"def function():\n{heads}{body}")
    lines = text.splitlines()
    block: ast.stmt = ast.parse(text).body[0]
    for _ in range(depth):
        assert isinstance(block, (ast.FunctionDef, ast.If))
        block = block.body[0]
    assert isinstance(block, (ast.FunctionDef, ast.If))
    return [
        "\n".join(line[indent:] for line in lines[each.lineno - 1 : each.end_lineno])
        for each in block.body
    ]


# --- expressions -----------------------------------------------------------------------------------


def expr_text(expr: ir.Expr) -> str:
    match expr:
        case ir.Name(id):
            return str(id)
        case ir.Literal(value):
            return str(literal_text(value))
        case ir.Const(index):
            return f"__vllm_consts__[{index}]"
        case ir.Global(path):
            return str(path)
        case ir.ListExpr(items):
            return f"[{_join(items, expr_text)}]"
        case ir.TupleExpr((only,)):
            return f"({expr_text(only)},)"
        case ir.TupleExpr(items):
            return f"({_join(items, expr_text)})"
        case ir.DictExpr(pairs):
            return f"{{{', '.join(f'{expr_text(k)}: {expr_text(v)}' for k, v in pairs)}}}"
        case ir.SliceExpr(start, stop, step):
            return f"slice({_join((start, stop, step), expr_text)})"
        case ir.Construct(kind, items):
            return f"{expr_text(kind)}({_join(items, expr_text)})"
        case _:
            assert_never(expr)


def plain(expr: ir.Expr) -> bool:
    """True if black leaves `expr_text` of ``expr`` as it is, between brackets."""
    match expr:
        case ir.Name() | ir.Const() | ir.Global():
            return True
        case ir.Literal(value):
            return bool(kind_of(value).settled(value))
        case ir.ListExpr(items) | ir.TupleExpr(items) | ir.Construct(_, items):
            return all(map(plain, items))
        case ir.DictExpr(pairs):
            return all(plain(key) and plain(value) for key, value in pairs)
        case ir.SliceExpr(start, stop, step):
            return plain(start) and plain(stop) and plain(step)
        case _:
            assert_never(expr)


def _is_value(expr: ir.Expr | None) -> bool:
    return isinstance(expr, (ir.Name, ir.Const))


def operand_text(expr: ir.Expr) -> str:
    """``expr`` beside an operator's sign: what is no name, no bracket and no plain literal gets parentheses."""
    if isinstance(expr, ir.Literal) and type(expr.value) in (int, float):
        text = literal_text(expr.value)
        return f"({text})" if text.startswith("-") else text
    return receiver_text(expr)


def receiver_text(expr: ir.Expr) -> str:
    """``expr`` before a dot or a bracket: numbers get parentheses too."""
    text = expr_text(expr)
    if isinstance(expr, ir.Literal):
        closed = kind_of(expr.value).closed
    else:
        empty = isinstance(expr, ir.TupleExpr) and not expr.items
        closed = not empty and not isinstance(expr, (ir.DictExpr, ir.SliceExpr))
    return text if closed else f"({text})"


def index_text(expr: ir.Expr) -> str:
    """``expr`` inside ``[]``: slices in slice notation, a tuple without its parentheses."""
    if isinstance(expr, ir.SliceExpr):
        return _slice_text(expr)
    if isinstance(expr, ir.TupleExpr) and len(expr.items) > 1:
        return ", ".join(
            _slice_text(item) if isinstance(item, ir.SliceExpr) else expr_text(item)
            for item in expr.items
        )
    return expr_text(expr)


def _slice_text(expr: ir.SliceExpr) -> str:
    start = "" if _is_none(expr.start) else expr_text(expr.start)
    stop = "" if _is_none(expr.stop) else expr_text(expr.stop)
    step = "" if _is_none(expr.step) else f":{expr_text(expr.step)}"
    return f"{start}:{stop}{step}"


def _is_none(expr: ir.Expr) -> bool:
    return isinstance(expr, ir.Literal) and expr.value is None


def _plain_index(expr: ir.Expr) -> bool:
    if isinstance(expr, ir.TupleExpr) and len(expr.items) > 1:
        return all(map(_plain_index_item, expr.items))
    return not isinstance(expr, ir.TupleExpr) and _plain_index_item(expr)


def _plain_index_item(expr: ir.Expr) -> bool:
    if isinstance(expr, ir.SliceExpr):
        return all(
            isinstance(part, ir.Name)
            or _is_none(part)
            or (isinstance(part, ir.Literal) and type(part.value) is int and part.value >= 0)
            for part in (expr.start, expr.stop, expr.step)
        )
    return isinstance(expr, ir.Name) or (
        isinstance(expr, ir.Literal) and not isinstance(expr.value, complex) and plain(expr)
    )


def _join(items: Sequence[ir.Expr], text: Callable[[ir.Expr], str]) -> str:
    return ", ".join(text(item) for item in items)


# --- statements ------------------------------------------------------------------------------------


class Layout:
    """Lays out statements one by one; those that black must see are collected and formatted in one call."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._odd: dict[int, dict[str, list[int]]] = {}  # by the number of blocks around them

    def add(self, stmt: ir.Stmt, depth: int = 0) -> None:
        """Take the next statement, which stands in ``depth`` blocks of its function's body."""
        place = len(self._texts)
        call = stmt.call if isinstance(stmt, ir.Finally) else stmt
        text = self._laid_out(call, BODY_INDENT + 4 * depth)
        if text is None:
            text = stmt_text(call)
            self._odd.setdefault(depth, {}).setdefault(text, []).append(place)
        self._texts.append(text)

    def finish(self) -> list[str]:
        """The text of each statement added, in order; of a `Finally` its call."""
        for depth, odd in self._odd.items():
            texts = format_statements(list(odd), depth)
            for formatted, places in zip(texts, odd.values(), strict=True):
                for place in places:
                    self._texts[place] = formatted
        self._odd.clear()
        return self._texts

    def _laid_out(self, stmt: ir.Stmt, indent: int) -> str | None:
        """``stmt`` in black's layout behind ``indent`` columns, or None if that is for black to say."""
        match stmt:
            case ir.CallSubmod() | ir.CallInlined() | ir.CallFunction() | ir.CallMethod():
                return _call_layout(stmt, indent)
            case ir.Try() | ir.Finally():
                return stmt_text(stmt)
            case ir.GetItem(value=value, index=index):
                known = _is_value(value) and _plain_index(index)
            case ir.GetAttr(value=value):
                known = _is_value(value)
            case ir.Infix():
                return _infix_layout(stmt, indent)
            case ir.Delete(names):
                return _bracketed("del ", names, indent) if names else None
            case ir.Return(value):
                return _return_layout(value, indent)
            case _:
                assert_never(stmt)
        return _if_fits(stmt_text(stmt), indent) if known else None


def _infix_layout(stmt: ir.Infix, indent: int) -> str | None:
    operands = [each for each in (stmt.left, stmt.right) if each is not None]
    if stmt.operator == "**":
        # Black hugs simple powers; what counts as simple is its own affair.
        if not all(isinstance(each, ir.Name) for each in operands):
            return None
        return _if_fits(_assign_one(stmt.target, "**".join(map(expr_text, operands))), indent)
    if all(_is_value(each) or _is_plain_operand(each) for each in operands):
        return _if_fits(stmt_text(stmt), indent)
    return None


def _is_plain_operand(expr: ir.Expr) -> bool:
    return isinstance(expr, ir.Literal) and plain(expr) and not operand_text(expr).startswith("(")


def _if_fits(text: str, indent: int) -> str | None:
    return text if indent + len(text) <= LINE_LENGTH else None


Call: TypeAlias = ir.CallSubmod | ir.CallInlined | ir.CallFunction | ir.CallMethod


def _call_layout(stmt: Call, indent: int) -> str | None:
    if isinstance(stmt, ir.CallMethod) and not (
        _is_value(stmt.receiver) and is_identifier(stmt.method)
    ):
        return None
    arguments = stmt.arguments
    if not all(map(plain, arguments.args)) or not all(plain(v) for _, v in arguments.kwargs):
        return None
    if not all(kind_of(key).settled(key) for key, _ in arguments.kwargs):
        return None
    head = _targets_text(stmt.targets, stmt.unpack) + _callee_text(stmt)
    return call_layout(head, _argument_texts(stmt), indent)


def call_layout(head: str, parts: Sequence[str], indent: int = BODY_INDENT) -> str | None:
    """``head(parts)``: on one line, else the arguments on one line, else one argument a line."""
    one_line = f"{head}({', '.join(parts)})"
    if indent + len(one_line) <= LINE_LENGTH:
        return one_line
    if indent + len(head) + 1 > LINE_LENGTH or not parts:
        return None
    return _broken(f"{head}(", parts, ")", indent)


def _broken(head: str, parts: Sequence[str], tail: str, indent: int) -> str | None:
    room = LINE_LENGTH - indent - 4
    middle = ", ".join(parts)
    if len(middle) <= room:
        return f"{head}\n    {middle}\n{tail}"
    return _one_a_line(head, parts, tail, indent)


def _one_a_line(head: str, parts: Sequence[str], tail: str, indent: int) -> str | None:
    """What black does at once with a literal that does not fit, and with arguments that don't fit on one line."""
    if len(parts) < 2 or any(indent + 4 + len(part) + 1 > LINE_LENGTH for part in parts):
        return None
    return "\n".join((head, *(f"    {part}," for part in parts), tail))


def _bracketed(word: str, parts: Sequence[str], indent: int) -> str | None:
    """``word`` and a list of names; black adds parentheses when they do not fit."""
    one_line = f"{word}{', '.join(parts)}"
    if indent + len(one_line) <= LINE_LENGTH:
        return one_line
    return _broken(f"{word}(", parts, ")", indent) if len(parts) > 1 else None


def _return_layout(value: ir.Expr, indent: int) -> str | None:
    match value:
        case ir.Name() | ir.Const():
            return _if_fits(f"return {expr_text(value)}", indent)
        case ir.Literal(literal) if literal is None or type(literal) in (bool, str):
            return _if_fits(f"return {expr_text(value)}", indent) if plain(value) else None
        case ir.TupleExpr(items) | ir.ListExpr(items) if all(map(plain, items)):
            text = _if_fits(f"return {expr_text(value)}", indent)
            if text is not None or len(items) < 2:
                return text
            opening, closing = "()" if isinstance(value, ir.TupleExpr) else "[]"
            parts = [expr_text(item) for item in items]
            return _one_a_line(f"return {opening}", parts, closing, indent)
        case _:
            return None


def signature_text(name: str, parameters: Sequence[str], *, known: bool) -> str:
    """``def name(parameters):`` in black's layout; ``known`` if each parameter is just a name."""
    one_line = f"def {name}({', '.join(parameters)}):"
    if known:
        if len(one_line) <= LINE_LENGTH:
            return one_line
        # Black writes a comma after an only parameter.
        parts = [f"{parameters[0]},"] if len(parameters) == 1 else parameters
        broken = _broken(f"def {name}(", parts, "):", BODY_INDENT)
        if broken is not None:
            return broken
    return format_source(f"{one_line}\n    pass\n").removesuffix("\n    pass\n")


# --- one-line texts --------------------------------------------------------------------------------


def stmt_text(stmt: ir.Stmt) -> str:
    """``stmt`` on one line, whatever its length."""
    match stmt:
        case ir.CallSubmod() | ir.CallInlined() | ir.CallFunction() | ir.CallMethod():
            call = f"{_callee_text(stmt)}({', '.join(_argument_texts(stmt))})"
            return _targets_text(stmt.targets, stmt.unpack) + call
        case ir.GetItem():
            index = index_text(stmt.index)
            return _assign_one(stmt.target, f"{receiver_text(stmt.value)}[{index}]")
        case ir.GetAttr():
            return _assign_one(stmt.target, f"{receiver_text(stmt.value)}.{stmt.attribute}")
        case ir.Infix(left=None):
            space = " " if stmt.operator == "not" else ""
            return _assign_one(stmt.target, f"{stmt.operator}{space}{operand_text(stmt.right)}")
        case ir.Infix(left=left, right=right):
            assert left is not None
            text = f"{operand_text(left)} {stmt.operator} {operand_text(right)}"
            return _assign_one(stmt.target, text)
        case ir.Try():
            return "try:"
        case ir.Finally(call):
            return f"finally: {stmt_text(call)}"
        case ir.Delete(names):
            return f"del {', '.join(names)}"
        case ir.Return(value):
            return f"return {expr_text(value)}"
        case _:
            assert_never(stmt)


def _callee_text(stmt: Call) -> str:
    match stmt:
        case ir.CallSubmod():
            return f"__vllm_submods__[{stmt.index}]"
        case ir.CallInlined():
            return str(stmt.function)
        case ir.CallFunction():
            return expr_text(stmt.function)
        case ir.CallMethod():
            if is_identifier(stmt.method):
                return f"{receiver_text(stmt.receiver)}.{stmt.method}"
            return f"getattr({expr_text(stmt.receiver)}, {literal_text(stmt.method)})"
        case _:
            assert_never(stmt)


def _argument_texts(stmt: Call) -> list[str]:
    parts = [expr_text(arg) for arg in stmt.arguments.args]
    kwargs = stmt.arguments.kwargs
    # From the first name on that can't be written as a keyword, the rest goes into one dict: order is kept.
    plain_count = next(
        (i for i, (key, _) in enumerate(kwargs) if not is_identifier(key)), len(kwargs)
    )
    parts += [f"{key}={expr_text(value)}" for key, value in kwargs[:plain_count]]
    if kwargs[plain_count:]:
        pairs = (f"{literal_text(key)}: {expr_text(v)}" for key, v in kwargs[plain_count:])
        parts.append(f"**{{{', '.join(pairs)}}}")
    if isinstance(stmt, ir.CallInlined) and stmt.passes_submods:
        parts.append("__vllm_submods__=__vllm_submods__")
    return parts


def _targets_text(targets: tuple[str, ...], unpack: bool) -> str:
    if not targets:
        return ""
    if unpack and len(targets) == 1:
        return f"({targets[0]},) = "
    return f"{', '.join(targets)} = "


def _assign_one(target: str | None, value: str) -> str:
    return value if target is None else f"{target} = {value}"
