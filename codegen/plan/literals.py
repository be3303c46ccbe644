"""Literals of emitted source, written, recognized and compared, and other Python on one line."""

import ast
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import EllipsisType, NoneType
from typing import Any, NamedTuple

from piecework.codegen.plan.names import is_identifier

# int -> str conversion is limited by CPython (4300 digits by default); larger integers go to consts.
_MAX_INLINE_BITS = 4096


class Kind(NamedTuple):
    """How values of one exact type are written; those that do not fit go to consts."""

    text: Callable[[Any], str] = ascii  # in black's spelling
    fits: Callable[[Any], bool] = lambda value: True


def _quoted(value: str | bytes) -> str:
    text, prefix = ascii(value), "b" if isinstance(value, bytes) else ""
    single = text.startswith(f"{prefix}'") and '"' not in text
    return f'{prefix}"{text[len(prefix) + 1 : -1]}"' if single else text


def _number(value: float | complex) -> str:
    """The sign between two parts has spaces around it; those at a beginning or exponent do not."""
    return re.sub(r"(?<=[^(e])([+-])", r" \1 ", ascii(value).replace("e+", "e"))


def _reads_back(value: complex) -> bool:
    # repr() drops the sign of a zero part; 1j - 0.0 and 0.0 - 1j are other numbers than they read.
    parts = (value.real, value.imag)
    zeros = all(part != 0 or math.copysign(1.0, part) > 0 for part in parts)
    return all(map(math.isfinite, parts)) and zeros and bool(value.real or value.imag >= 0)


#: Every type whose values are written into emitted source.
KINDS: Mapping[type, Kind] = {
    **dict.fromkeys((NoneType, bool), Kind()),
    **dict.fromkeys((str, bytes), Kind(_quoted)),
    EllipsisType: Kind(lambda value: "..."),
    int: Kind(fits=lambda value: value.bit_length() <= _MAX_INLINE_BITS),
    float: Kind(_number, math.isfinite),
    complex: Kind(_number, _reads_back),
}


def is_inline_literal(value: object) -> bool:
    """Whether ``value``, of just this type, has a literal that evaluates back to it."""
    kind = KINDS.get(type(value))
    return kind is not None and kind.fits(value)


def literal_text(value: object) -> str:
    """A literal as ASCII source."""
    return KINDS[type(value)].text(value)


def same_literal(left: object, right: object) -> bool:
    """Whether two values are of one type and nothing can tell them apart."""
    if type(left) is not type(right):
        return False
    for base in (float, complex):
        if isinstance(left, base):
            return left == right and base.__repr__(left) == base.__repr__(right)
    return type(left) in KINDS and left == right


def is_literal(node: ast.expr) -> bool:
    """Whether an expression is a literal, with its sign and both parts of a complex number."""
    match node:
        case ast.Constant():
            return True
        case ast.UnaryOp(ast.USub(), ast.Constant(number)):
            return type(number) in (int, float, complex)  # bool has a minus too, and gives no bool
        case ast.BinOp(left, ast.Add() | ast.Sub(), ast.Constant(complex())):
            real = left.operand if isinstance(left, ast.UnaryOp) and is_literal(left) else left
            return isinstance(real, ast.Constant) and type(real.value) in (int, float)
    return False


def operand(text: str, *, receiver: bool = False) -> str:
    """``text`` beside a sign or before a dot, in brackets where it would be read otherwise."""
    loose = text.startswith("-") or (" " in text and text.endswith("j"))
    number = receiver and (text[0].isdigit() or text.startswith("{"))
    return f"({text})" if loose or number else text


def arguments_text(args: Iterable[str], kwargs: Sequence[tuple[str, str]] = ()) -> str:
    """Positional arguments, then named ones, as a dict from a name that is no keyword on."""
    parts = list(args)
    for number, (key, value) in enumerate(kwargs):
        if not is_identifier(key):
            rest = ", ".join(f"{literal_text(name)}: {each}" for name, each in kwargs[number:])
            parts.append(f"**{{{rest}}}")
            break
        parts.append(f"{key}={value}")
    return ", ".join(parts)


def attribute_text(value: str, name: str) -> str:
    if is_identifier(name):
        return f"{operand(value, receiver=True)}.{name}"
    return f"getattr({value}, {literal_text(name)})"


def targets_text(targets: Sequence[str], unpack: bool) -> str:
    if not targets:
        return ""
    return f"({targets[0]},) = " if unpack and len(targets) == 1 else f"{', '.join(targets)} = "


def tuple_text(items: Sequence[str]) -> str:
    return f"({items[0]},)" if len(items) == 1 else f"({', '.join(items)})"
