"""Literals of emitted source, written, read and compared, and other Python on one line."""

from __future__ import annotations

import ast
import math
from collections.abc import Iterable, Sequence
from types import EllipsisType, NoneType
from typing import Any, NamedTuple

from piecework.codegen.plan.names import is_identifier

# int -> str conversion is limited by CPython (4300 digits by default); larger integers go to consts.
_MAX_INLINE_BITS = 4096
_KINDS = (NoneType, bool, int, float, complex, str, bytes, EllipsisType)


class Read(NamedTuple):
    """A literal that was read from a text."""

    value: object


def is_inline_literal(value: object) -> bool:
    """Whether ``value``, of just this type, has a literal that evaluates back to it."""
    match value:
        case float() if type(value) is float:
            return math.isfinite(value)
        case complex() if type(value) is complex:
            # repr() drops the sign of a zero part; 1j - 0.0 and 0.0 - 1j are other numbers than they read.
            parts = (value.real, value.imag)
            zeros = all(part != 0 or math.copysign(1.0, part) > 0 for part in parts)
            return all(map(math.isfinite, parts)) and zeros and bool(value.real or value.imag >= 0)
        case int() if type(value) is int:
            return value.bit_length() <= _MAX_INLINE_BITS
    return type(value) in _KINDS


def literal_text(value: object) -> str:
    """A literal as ASCII source in black's spelling; ``...`` for Ellipsis."""
    text = ascii(value)
    match value:
        case EllipsisType():
            return "..."
        case str() | bytes():
            prefix = "b" if isinstance(value, bytes) else ""
            single = text.startswith(f"{prefix}'") and '"' not in text
            return f'{prefix}"{text[len(prefix) + 1 : -1]}"' if single else text
        case float() | complex():
            text = text.replace("e+", "e")
            if isinstance(value, complex):
                signs = [
                    i for i, c in enumerate(text) if c in "+-" and i > 1 and text[i - 1] != "e"
                ]
                for at in signs[-1:]:
                    return f"{text[:at]} {text[at]} {text[at + 1:]}"
    return text


def same_literal(left: object, right: object) -> bool:
    """Whether two values are of one type and nothing can tell them apart."""
    if type(left) is not type(right):
        return False
    for base in (float, complex):
        if isinstance(left, base):
            return left == right and base.__repr__(left) == base.__repr__(right)
    return type(left) in _KINDS and left == right


def read_literal(node: ast.expr) -> Read | None:
    """The literal that an expression is, with its sign and both parts of a complex number."""
    match node:
        case ast.Constant(value=value):
            return Read(value)
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=number)):
            # bool has a minus too, and what comes out is no bool
            return Read(-number) if type(number) in (int, float, complex) else None  # type: ignore[operator]
        case ast.BinOp(left=left, op=ast.Add() | ast.Sub() as sign, right=ast.Constant(value=part)):
            real = read_literal(left)
            if real is None or type(real.value) not in (int, float) or type(part) is not complex:
                return None
            whole: Any = real.value
            return Read(whole + part if isinstance(sign, ast.Add) else whole - part)
    return None


# --- pieces of Python ----------------------------------------------------------------------------


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
