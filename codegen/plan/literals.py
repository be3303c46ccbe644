"""Literals of emitted source. In: Python values, or expressions of a text. Out: which values have a literal, how it is written, read back and compared.

One row per kind: a new kind is a row of `KINDS` and, where its literal is more than one word, a case of `read_literal`.
"""

from __future__ import annotations

import ast
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import EllipsisType, NoneType
from typing import Any, NamedTuple

# int -> str conversion is limited by CPython (4300 digits by default); larger integers go to consts.
_MAX_INLINE_BITS = 4096


@dataclass(frozen=True, slots=True)
class Kind:
    """Literals of one exact type.

    Attributes:
        text: the literal as ASCII source in black's spelling.
        same: whether two values of the kind can't be told apart, the sign of a zero included; NaN is never the same.
        fits: whether a value has a literal that evaluates back to it.
    """

    text: Callable[[Any], str] = ascii
    same: Callable[[Any, Any], bool] = lambda left, right: bool(left == right)
    fits: Callable[[Any], bool] = lambda _: True


class Read(NamedTuple):
    """A literal that was read from a text."""

    value: object


def is_inline_literal(value: object) -> bool:
    """Whether ``value`` may be written inline (by exact type, finite floats only)."""
    kind = KINDS.get(type(value))
    return kind is not None and kind.fits(value)


def literal_text(value: object) -> str:
    """A literal as ASCII source in black's spelling; ``...`` for Ellipsis. What has none is shown as it shows itself, for errors."""
    return KINDS.get(type(value), _PLAIN).text(value)


def same_literal(left: object, right: object) -> bool:
    """Whether two values are of one type and nothing can tell them apart; floats and complex numbers of other classes (numpy's) go by their bits too."""
    if type(left) is not type(right):
        return False
    base = next((each for each in (float, complex) if isinstance(left, each)), type(left))
    kind = KINDS.get(base)
    return kind is not None and kind.same(left, right)


def read_literal(node: ast.expr) -> Read | None:
    """The literal that an expression is, with its sign and both parts of a complex number; None for anything else."""
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


def _float_text(value: float) -> str:
    return ascii(value).replace("e+", "e")


def _same_bits(left: float, right: float) -> bool:
    return left == left and struct.pack("d", left) == struct.pack("d", right)


def _complex_text(value: complex) -> str:
    text = ascii(value).replace("e+", "e")
    signs = [i for i, c in enumerate(text) if c in "+-" and i > 1 and text[i - 1] != "e"]
    return f"{text[:signs[-1]]} {text[signs[-1]]} {text[signs[-1] + 1:]}" if signs else text


def _complex_survives_repr(value: complex) -> bool:
    if not (math.isfinite(value.real) and math.isfinite(value.imag)):
        return False
    # repr() drops the sign of a zero part: complex(-0.0, 1.0) reads back as (0.0, 1.0).
    # complex(0.0, -1.0) is written -1j, which is complex(-0.0, -1.0).
    if value.real == 0 and value.imag < 0:
        return False
    parts = (value.real, value.imag)
    return all(part != 0 or math.copysign(1.0, part) > 0 for part in parts)


def _quoted(value: str | bytes) -> str:
    text = ascii(value)
    prefix = "b" if isinstance(value, bytes) else ""
    inner = text[len(prefix) + 1 : -1]
    return f'{prefix}"{inner}"' if text[len(prefix)] == "'" and '"' not in text else text


_PLAIN = Kind()
KINDS: Mapping[type, Kind] = {
    NoneType: Kind(),
    bool: Kind(),
    int: Kind(fits=lambda value: value.bit_length() <= _MAX_INLINE_BITS),
    float: Kind(_float_text, _same_bits, math.isfinite),
    complex: Kind(
        _complex_text,
        lambda left, right: _same_bits(left.real, right.real) and _same_bits(left.imag, right.imag),
        _complex_survives_repr,
    ),
    str: Kind(_quoted),
    bytes: Kind(_quoted),
    EllipsisType: Kind(lambda _: "..."),
}
