"""Expressions over sizes as text: what is written computes what torch's expression computes, in the one namespace that all texts share."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from functools import partial

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._sympy import functions as F
from torch.utils._sympy.functions import make_opaque_unary_fn

from piecework.codegen.plan.size_text import RESERVED, evaluate, size_text, symbols_in
from piecework.errors import EmitError

SYMBOLS = sympy.symbols("s0 s1 s2", integer=True, positive=True)
NAMES = {"s0": "s0", "s1": "batch", "s2": "s50"}
BITWISE = (F.BitwiseFn_bitwise_and, F.BitwiseFn_bitwise_or, F.BitwiseFn_bitwise_xor)
UNARY = ("sqrt", "exp", "log", "log2")


def _of(function: Callable[..., sympy.Expr], operands: tuple[sympy.Expr, sympy.Expr]) -> sympy.Expr:
    try:
        return function(*operands)
    except ValueError:  # sympy can't tell which of two numbers is larger where one is wrapped
        if function not in (F.Max, F.Min):
            raise
        return operands[0]


def integers() -> st.SearchStrategy[sympy.Expr]:
    """Expressions that are integers, over torch's functions of sizes."""
    leaves = st.one_of(st.sampled_from(SYMBOLS), st.integers(-7, 64).map(sympy.Integer))

    def extended(inner: st.SearchStrategy[sympy.Expr]) -> st.SearchStrategy[sympy.Expr]:
        divisors = st.one_of(st.integers(1, 9).map(sympy.Integer), st.sampled_from(SYMBOLS))
        two = st.tuples(inner, inner)
        quotient = st.tuples(inner, divisors)
        small = st.tuples(inner, st.integers(0, 3).map(sympy.Integer))
        reals = quotient.map(lambda p: F.IntTrueDiv(*p))
        made = {
            two: (operator.add, operator.sub, operator.mul, F.Max, F.Min, *BITWISE),
            quotient: (F.FloorDiv, F.PythonMod, F.CeilDiv),
            small: (F.PowByNatural, F.LShift, F.RShift),
        }
        return st.one_of(
            *(given.map(partial(_of, f)) for given, each in made.items() for f in each),
            *map(inner.map, (F.Identity, abs)),
            *map(reals.map, (F.FloorToInt, F.CeilToInt, F.TruncToInt, F.RoundToInt)),
        )

    return st.recursive(leaves, extended, max_leaves=5)


def numbers() -> st.SearchStrategy[sympy.Expr]:
    """Integers, and real numbers that are made of them."""
    divisors = st.one_of(st.integers(1, 9).map(sympy.Integer), st.sampled_from(SYMBOLS))
    return st.one_of(
        integers(),
        st.tuples(integers(), divisors).map(lambda p: F.IntTrueDiv(*p)),
        integers().map(F.ToFloat),
        integers().map(lambda e: F.FloatTrueDiv(F.ToFloat(e), sympy.Float(3.0))),
        integers().map(lambda e: F.RoundDecimal(F.ToFloat(e) * sympy.Float(0.37), sympy.Integer(1))),
        st.tuples(st.sampled_from(UNARY), st.sampled_from(SYMBOLS)).map(
            lambda p: make_opaque_unary_fn(p[0])(p[1])
        ),
        st.tuples(st.sampled_from(SYMBOLS), st.sampled_from((0.5, 2.0))).map(
            lambda p: F.FloatPow(F.ToFloat(p[0]), sympy.Float(p[1]))
        ),
    )  # fmt: skip


def relations() -> st.SearchStrategy[sympy.Basic]:
    kinds = st.sampled_from((sympy.Eq, sympy.Ne, sympy.Lt, sympy.Le, sympy.Gt, sympy.Ge))
    single = st.tuples(kinds, numbers(), numbers()).map(lambda t: t[0](t[1], t[2]))
    return st.one_of(
        single,
        st.lists(single, min_size=2, max_size=3).map(lambda each: sympy.And(*each)),
        st.lists(single, min_size=2, max_size=3).map(lambda each: sympy.Or(*each)),
        single.map(sympy.Not),
    )


def direct(expr: sympy.Basic, values: dict[sympy.Symbol, int]) -> object:
    """What torch's functions make of the expression for these values; None where they leave it as it is."""
    numbers = {symbol: sympy.Integer(value) for symbol, value in values.items()}
    # An Identity is a number that sympy does not take for one: it would be another number than the same one without.
    expr = sympy.sympify(expr).replace(F.Identity, lambda inner: inner)
    found = expr.xreplace(numbers)
    if found in (sympy.true, sympy.false):
        return bool(found)
    if not found.is_number or found.has(sympy.oo, -sympy.oo, sympy.nan, sympy.zoo):
        return None
    return int(found) if found.is_Integer else float(found)


def same(left: object, right: object) -> bool:
    if isinstance(left, float) or isinstance(right, float):
        return math.isclose(float(left), float(right), rel_tol=1e-9, abs_tol=1e-9)  # type: ignore[arg-type]
    return left == right


VALUES = st.tuples(*[st.integers(1, 65)] * 3)


@given(st.one_of(numbers(), relations()), VALUES)
@settings(max_examples=600, deadline=None)
def test_the_text_computes_what_the_expression_computes(
    expr: sympy.Basic, numbers: tuple[int, ...]
) -> None:
    values = dict(zip(SYMBOLS, numbers, strict=True))
    try:
        expected = direct(expr, values)
    except (ArithmeticError, ValueError, TypeError, RecursionError):
        return  # it has no value, or torch itself can't tell
    if expected is None:
        return
    try:
        text = size_text(expr, NAMES)
    except EmitError as error:
        assert "Infinity" in str(error), error
        return
    named = {NAMES[str(symbol)]: value for symbol, value in values.items()}
    found = evaluate(text, named)
    assert same(found, expected), (text, expr, named)
    assert symbols_in(text) <= named.keys()


@pytest.mark.parametrize(
    ("expr", "text"),
    [
        (lambda a, b: 4 * a, "4 * s0"),
        (lambda a, b: a - b, "s0 - batch"),
        (lambda a, b: -a, "-s0"),
        (lambda a, b: -2 * a, "-2 * s0"),
        (lambda a, b: b - 2 * a, "-2 * s0 + batch"),
        (lambda a, b: F.PythonMod(-a, 3) + b, "batch + -s0 % 3"),
        (lambda a, b: F.FloorDiv(-2 * a, 3) + b, "batch + -2 * s0 // 3"),
        (lambda a, b: -3 * a * b, "-3 * s0 * batch"),
        (lambda a, b: a * (b + 1), "s0 * (batch + 1)"),
        (lambda a, b: F.FloorDiv(a, 2) + 1, "s0 // 2 + 1"),
        (lambda a, b: F.FloorDiv(a + b, a), "(s0 + batch) // s0"),
        (lambda a, b: sympy.Eq(F.Mod(a, b), 0), "s0 % batch == 0"),
        (lambda a, b: F.FloorToInt(F.IntTrueDiv(a, 3)), "math.floor(s0 / 3)"),
        (lambda a, b: sympy.Gt(abs(a - 20), 2), "abs(s0 - 20) > 2"),
    ],
)
def test_texts_are_plain(expr: object, text: str) -> None:
    assert size_text(expr(*SYMBOLS[:2]), NAMES) == text  # type: ignore[operator]


def test_what_has_no_text_is_refused_by_type() -> None:
    s0 = SYMBOLS[0]
    with pytest.raises(EmitError, match="zeta"):
        size_text(sympy.zeta(s0), NAMES)
    with pytest.raises(EmitError, match="which no argument tells"):
        size_text(sympy.Symbol("u7"), NAMES)
    with pytest.raises(EmitError, match="Infinity"):
        size_text(sympy.Lt(s0, sympy.Float("inf"), evaluate=False), NAMES)


def test_names_that_texts_use_are_known() -> None:
    assert {"math", "abs", "max", "min"} <= RESERVED
