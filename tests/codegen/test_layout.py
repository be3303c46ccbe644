"""The layout of statements is black's own, whatever their form, length and digits."""

from __future__ import annotations

import ast
from textwrap import indent

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from piecework.codegen.plan.literals import (
    arguments_text,
    is_literal,
    literal_text,
    operand,
    targets_text,
    tuple_text,
)
from piecework.codegen.plan.render import format_source, format_statements

NAMES = st.sampled_from(
    ["x", "y", "out_1", "l_self_modules_layers_modules_0_parameters_weight_", "a" * 60, "b" * 79]
)
LITERALS = st.one_of(
    st.integers(-(10**30), 10**30),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=30),
    st.binary(max_size=12),
    st.sampled_from(
        [
            *(None, True, False, ..., 1j, 2 - 3j, 1e16, 1e-7, 2.5e100, 1 + 1e20j),
            *("it's", 'say "x"', "'\""),
        ]
    ),
)


def texts(depth: int = 2) -> st.SearchStrategy[str]:
    """Expressions as `lower` writes them."""
    leaf = st.one_of(
        NAMES,
        NAMES,
        st.integers(0, 200).map("__vllm_consts__[{}]".format),
        LITERALS.map(literal_text),
        st.just("torch.nn.functional.linear"),
    )
    if depth == 0:
        return leaf
    items = st.lists(texts(depth - 1), max_size=4)
    return st.one_of(
        leaf,
        items.map(", ".join).map("[{}]".format),
        items.filter(bool).map(tuple_text),
        st.tuples(leaf, texts(depth - 1)).map(lambda pair: f"{{{pair[0]}: {pair[1]}}}"),
        st.tuples(NAMES, items).map(lambda call: f"{call[0]}({', '.join(call[1])})"),
    )


PAIRS = st.tuples(st.sampled_from(["alpha", "from", "dim", "a-b", "out"]), texts())
ARGUMENTS = st.builds(
    arguments_text,
    st.lists(texts(), max_size=8),
    st.lists(PAIRS, max_size=3, unique_by=lambda pair: pair[0]),
)
CALLS = st.builds(
    "{}({})".format,
    st.sampled_from(["torch.ops.aten.add.Tensor", "__vllm_submods__[12]"]),
    ARGUMENTS,
)
SIGNED = st.tuples(NAMES, st.sampled_from(["+", "**", "<<", "=="]), LITERALS).map(
    lambda parts: f"{parts[0]} {parts[1]} {operand(literal_text(parts[2]))}"
)
TARGETS = st.lists(NAMES, max_size=4, unique=True).map(
    lambda names: targets_text(tuple(names), True)
)
STATEMENTS = st.one_of(
    st.tuples(TARGETS, st.one_of(CALLS, SIGNED)).map("".join),
    st.lists(NAMES, min_size=1, max_size=5, unique=True).map(lambda x: f"del {', '.join(x)}"),
    texts().map("return {}".format),
    st.tuples(SIGNED, CALLS).map(lambda parts: f"if not ({parts[0]}):\n    {parts[1]}"),
)


@given(st.lists(STATEMENTS, min_size=1, max_size=6), st.integers(0, 3))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_statements_are_laid_out_as_black_would(statements: list[str], depth: int) -> None:
    laid_out = format_statements([(each, depth) for each in statements])
    for stmt, text in zip(statements, laid_out, strict=True):
        heads = "".join(f"{'    ' * level}if block:\n" for level in range(1, depth + 1))
        margin = "    " * (depth + 1)
        whole = indent(f"{stmt}\n", margin)
        expected = format_source(f"def function():\n{heads}{whole}").splitlines()[depth + 1 :]
        assert text.splitlines() == [line[len(margin) :] for line in expected]
        if not stmt.startswith("del"):  # del (a, b) is del a, b
            trees = [ast.parse("def f():\n" + indent(each, "    ")) for each in (stmt, text)]
            assert ast.dump(trees[0]) == ast.dump(trees[1])


@given(LITERALS)
@settings(max_examples=300, deadline=None)
def test_literals_read_back_as_they_are(value: object) -> None:
    text = literal_text(value)
    assert text.isascii() and "\n" not in text and is_literal(ast.parse(text).body[0].value)
    if isinstance(value, complex) and value.real == 0:
        return  # which complex numbers are literals is for `consts` to say
    back = eval(text)
    assert type(back) is type(value) and repr(back) == repr(value)


@pytest.mark.parametrize("digits", ["1", "12", "9007199254740993"])
def test_digits_are_put_back_where_they_were(digits: str) -> None:
    """Also where black adds parentheses, commas and lines, and in what looks like an escape or an exponent."""
    names = [f"hidden_states_{place}_{digits}" for place in range(7)]
    text = f"call({', '.join(names)}, 1.5e-7, -{digits}, '\\x41', b'\\x07', {digits}j)"
    for one in (f"{names[0]} = {text}", f"del {', '.join(names)}", f"x{digits} = y ** {digits}"):
        (found,) = format_statements([(one, 0)])
        lines = format_source(f"def f():\n    {one}\n").splitlines()[1:]
        assert found.splitlines() == [line[4:] for line in lines]
