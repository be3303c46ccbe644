"""Expressions and statements as text. In: those of a plan. Out: Python source, each statement on one line; a block has its statements below it.

An operand is bracketed where Python would group it otherwise. How lines are broken is for `formatting`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import assert_never

from piecework.codegen.plan import ir
from piecework.codegen.plan.literals import kind_of, literal_text
from piecework.codegen.plan.names import is_identifier

# How tightly a text binds, from the loosest. A number needs brackets before a dot only.
(_TEST, _OR, _AND, _NOT, _COMPARE, _BITOR, _BITXOR, _BITAND, _SHIFT, _ADD, _MUL, _SIGN, _POWER, _NUMBER, _ATOM) = range(15)  # fmt: skip

_PREFIX = {"not": _NOT, "-": _SIGN, "+": _SIGN, "~": _SIGN}
_INFIX = {
    **{"or": _OR, "and": _AND, "|": _BITOR, "^": _BITXOR, "&": _BITAND, "**": _POWER},
    **dict.fromkeys(("==", "!=", "<", "<=", ">", ">=", "is", "is not", "in"), _COMPARE),
    **dict.fromkeys(("<<", ">>"), _SHIFT),
    **dict.fromkeys(("+", "-"), _ADD),
    **dict.fromkeys(("*", "/", "//", "%", "@"), _MUL),
}


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
            return f"[{_joined(items)}]"
        case ir.TupleExpr((only,)):
            return f"({expr_text(only)},)"
        case ir.TupleExpr(items):
            return f"({_joined(items)})"
        case ir.SetExpr(items):
            return f"{{{_joined(items)}}}"
        case ir.DictExpr(pairs):
            return f"{{{', '.join(f'{expr_text(k)}: {expr_text(v)}' for k, v in pairs)}}}"
        case ir.SliceExpr(start, stop, step):
            return f"slice({_joined((start, stop, step))})"
        case ir.Attribute(value, name):
            if is_identifier(name):
                return f"{_within(value, _ATOM)}.{name}"
            return f"getattr({expr_text(value)}, {literal_text(name)})"
        case ir.Item(value, index):
            return f"{_within(value, _ATOM)}[{_index_text(index)}]"
        case ir.Operation(sign, operands):
            return _operation_text(sign, operands)
        case ir.Call(function, arguments):
            return f"{expr_text(function)}({', '.join(_argument_texts(arguments))})"
        case ir.Star(stars, value):
            return f"{stars}{expr_text(value)}"
        case _:
            assert_never(expr)


def _joined(items: Iterable[ir.Expr]) -> str:
    return ", ".join(map(expr_text, items))


def _within(expr: ir.Expr, level: int) -> str:
    """``expr`` where something binds as tightly as ``level``."""
    text = expr_text(expr)
    return text if _level(expr, text) >= level else f"({text})"


def _level(expr: ir.Expr, text: str) -> int:
    match expr:
        case ir.Operation(sign, operands):
            if sign == "if":
                return _TEST
            return _PREFIX[sign] if len(operands) == 1 and sign in _PREFIX else _INFIX[sign]
        case ir.Literal(value) if kind_of(value).closed or text.startswith("("):
            return _ATOM
        case ir.Literal(value):
            return _BITOR if text.startswith("-") or type(value) is complex else _NUMBER
        case ir.DictExpr() | ir.SliceExpr() | ir.TupleExpr(()) | ir.Star():
            return _TEST
        case _:
            return _ATOM


def _operation_text(sign: str, operands: tuple[ir.Expr, ...]) -> str:
    if sign == "if":
        value, test, other = operands
        return f"{_within(value, _OR)} if {_within(test, _OR)} else {_within(other, _TEST)}"
    if len(operands) == 1 and sign in _PREFIX:
        return f"{sign}{' ' if sign == 'not' else ''}{_within(operands[0], _SIGN)}"
    level = _INFIX[sign]
    if sign == "**":
        first, others = _NUMBER, _SIGN
    elif sign == "or":
        first = others = _NOT  # an `and` in it is bracketed, for readers
    else:
        first, others = level + (level == _COMPARE), level + 1
    texts = [_within(operands[0], first), *(_within(each, others) for each in operands[1:])]
    return f" {sign} ".join(texts)


def _index_text(expr: ir.Expr) -> str:
    """``expr`` inside ``[]``: slices in slice notation, a tuple without its parentheses."""
    if isinstance(expr, ir.TupleExpr) and len(expr.items) > 1:
        return ", ".join(map(_slice_text, expr.items))
    return _slice_text(expr)


def _slice_text(expr: ir.Expr) -> str:
    if not isinstance(expr, ir.SliceExpr):
        return expr_text(expr)
    none = ir.Literal(None)
    start, stop, step = (
        "" if part == none else expr_text(part) for part in (expr.start, expr.stop, expr.step)
    )
    return f"{start}:{stop}" + (f":{step}" if step else "")


def _argument_texts(arguments: ir.Arguments) -> Iterator[str]:
    named = [each for each in arguments.args if isinstance(each, ir.Star) and each.stars == "**"]
    yield from (expr_text(each) for each in arguments.args if each not in named)
    kwargs = list(arguments.kwargs)
    while kwargs and is_identifier(kwargs[0][0]):
        key, value = kwargs.pop(0)
        yield f"{key}={expr_text(value)}"
    # From the first name on that can't be written as a keyword, the rest goes into one dict: order is kept.
    if kwargs:
        yield f"**{{{', '.join(f'{literal_text(key)}: {expr_text(v)}' for key, v in kwargs)}}}"
    yield from map(expr_text, named)


# --- statements ------------------------------------------------------------------------------------


def stmt_text(stmt: ir.Stmt) -> str:
    """``stmt`` on one line, whatever its length; the statements of a block below it."""
    match stmt:
        case ir.Assign(targets, unpack, value):
            return _targets_text(targets, unpack) + expr_text(value)
        case ir.CallSubmod(targets, unpack, index, arguments):
            call = f"__vllm_submods__[{index}]({', '.join(_argument_texts(arguments))})"
            return _targets_text(targets, unpack) + call
        case ir.CallInlined(targets, unpack, function, arguments, passes_submods):
            parts = [*_argument_texts(arguments)]
            parts += ["__vllm_submods__=__vllm_submods__"] * passes_submods
            return f"{_targets_text(targets, unpack)}{function}({', '.join(parts)})"
        case ir.If(test, body):
            return "\n    ".join([f"if {expr_text(test)}:", *map(_inside, body)])
        case ir.With(context, body):
            return "\n    ".join([f"with {expr_text(context)}:", *map(_inside, body)])
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


def _inside(stmt: ir.Stmt) -> str:
    return stmt_text(stmt).replace("\n", "\n    ")


def _targets_text(targets: tuple[str, ...], unpack: bool) -> str:
    if not targets:
        return ""
    if unpack and len(targets) == 1:
        return f"({targets[0]},) = "
    return f"{', '.join(targets)} = "


def signature_text(function: ir.Function) -> str:
    """``def name(parameters):``; what takes ``__vllm_submods__`` takes it by keyword."""
    parameters = list(function.parameters)
    if function.takes_submods:
        ends = len(parameters) - (bool(parameters) and parameters[-1].kind == "**")
        parameters.insert(ends, ir.Parameter("__vllm_submods__", "k"))
    kinds = [each.kind for each in parameters]
    parts: list[str] = []
    for number, each in enumerate(parameters):
        if each.kind == "k" and not {"*", "k"} & {*kinds[:number]}:
            parts.append("*")
        stars = each.kind if each.kind in ("*", "**") else ""
        default = "" if each.default is None else f"={expr_text(each.default)}"
        parts.append(f"{stars}{each.name}{default}")
        if each.kind == "/" and kinds[number + 1 : number + 2] != ["/"]:
            parts.append("/")
    return f"def {function.name}({', '.join(parts)}):"
