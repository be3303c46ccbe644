"""The layout of statements is black's own, whatever their form and length; nothing is left to chance by the shortcuts."""

from __future__ import annotations

import ast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from piecework.codegen import ir
from piecework.codegen.layout import (
    Layout,
    call_layout,
    format_source,
    format_statements,
    signature_text,
    stmt_text,
)
from piecework.codegen.literals import literal_text

ORIGIN = ir.Origin()
NAMES = st.sampled_from(
    ["x", "y", "out_1", "l_self_modules_layers_modules_0_parameters_weight_", "a" * 60, "b" * 79]
)
LITERALS = st.one_of(
    st.integers(-(10**30), 10**30),
    st.floats(allow_nan=False, allow_infinity=False).filter(lambda v: repr(v) != "-0.0" or True),
    st.text(max_size=30),
    st.binary(max_size=12),
    st.sampled_from(
        [
            None,
            True,
            False,
            ...,
            1j,
            2 - 3j,
            1e16,
            1e-7,
            2.5e100,
            1 + 1e20j,
            "it's",
            'say "x"',
            "'\"",
        ]
    ),
)


def exprs(depth: int = 2) -> st.SearchStrategy[ir.Expr]:
    leaf: st.SearchStrategy[ir.Expr] = st.one_of(
        NAMES.map(ir.Name),
        NAMES.map(ir.Name),
        st.integers(0, 200).map(ir.Const),
        LITERALS.map(ir.Literal),
        st.just(ir.Global("torch.nn.functional.linear")),
    )
    if depth == 0:
        return leaf
    inner = exprs(depth - 1)
    items = st.lists(inner, max_size=4).map(tuple)
    return st.one_of(
        leaf,
        leaf,
        items.map(ir.ListExpr),
        items.map(ir.TupleExpr),
        st.lists(st.tuples(leaf, inner), max_size=3).map(lambda pairs: ir.DictExpr(tuple(pairs))),
        st.builds(ir.SliceExpr, inner, inner, inner),
        st.builds(ir.Construct, st.integers(0, 9).map(ir.Const), items),
    )


ARGUMENTS = st.builds(
    ir.Arguments,
    st.lists(exprs(), max_size=8).map(tuple),
    st.lists(
        st.tuples(st.sampled_from(["alpha", "from", "dim", "a-b", "out"]), exprs()),
        max_size=3,
        unique_by=lambda kv: kv[0],
    ).map(tuple),
)
TARGETS = st.lists(NAMES, max_size=4, unique=True).map(tuple)
VALUES = st.one_of(NAMES.map(ir.Name), st.integers(0, 9).map(ir.Const))


def call(kind: type, *extra: st.SearchStrategy[object]) -> st.SearchStrategy[ir.Stmt]:
    def build(targets: tuple[str, ...], parts: tuple[object, ...]) -> ir.Stmt:
        unpack = len(targets) > 1 or (len(targets) == 1 and len(targets[0]) % 2 == 0)
        return kind(targets, unpack, *parts, ORIGIN)  # type: ignore[no-any-return]

    return st.builds(build, TARGETS, st.tuples(*extra))


STATEMENTS: st.SearchStrategy[ir.Stmt] = st.one_of(
    call(ir.CallSubmod, st.integers(0, 300), ARGUMENTS),
    call(ir.CallInlined, NAMES, ARGUMENTS, st.booleans()),
    call(ir.CallFunction, st.sampled_from(["torch.ops.aten.add.Tensor", "attention", "len"]).map(ir.Global), ARGUMENTS),
    call(ir.CallMethod, exprs(1), st.sampled_from(["view", "add_", "a b", "lambda"]), ARGUMENTS),
    st.builds(ir.GetItem, st.none() | NAMES, VALUES, exprs(), st.just(ORIGIN)),
    st.builds(ir.GetAttr, st.none() | NAMES, VALUES, st.sampled_from(["shape", "ndim"]), st.just(ORIGIN)),
    st.builds(ir.Infix, st.none() | NAMES, st.sampled_from(["+", "-", "*", "**", "@", "<<", "<", "==", "%", "//"]), VALUES, st.one_of(VALUES, LITERALS.map(ir.Literal)), st.just(ORIGIN)),
    st.builds(ir.Infix, st.none() | NAMES, st.sampled_from(["+", "-", "**", "<"]), LITERALS.map(ir.Literal), VALUES, st.just(ORIGIN)),
    st.builds(ir.Infix, st.none() | NAMES, st.sampled_from(["-", "+", "~", "not"]), st.none(), VALUES, st.just(ORIGIN)),
    st.lists(NAMES, min_size=1, max_size=5, unique=True).map(lambda names: ir.Delete(tuple(names))),
    exprs().map(lambda value: ir.Return(value, ORIGIN)),
)  # fmt: skip


@given(st.lists(STATEMENTS, min_size=1, max_size=6), st.integers(0, 3))
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_statements_are_laid_out_as_black_would(statements: list[ir.Stmt], depth: int) -> None:
    layout = Layout()
    for stmt in statements:
        layout.add(stmt, depth)
    texts = layout.finish()
    assert texts == format_statements([stmt_text(stmt) for stmt in statements], depth)


@given(st.lists(STATEMENTS, min_size=1, max_size=3))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_layout_changes_no_meaning(statements: list[ir.Stmt]) -> None:
    layout = Layout()
    for stmt in statements:
        layout.add(stmt)
    for stmt, text in zip(statements, layout.finish(), strict=True):
        as_laid_out = ast.parse(f"def f():\n    {text}".replace("\n", "\n    "))
        as_said = ast.parse(f"def f():\n        {stmt_text(stmt)}")
        if isinstance(stmt, ir.Delete):  # del (a, b) is del a, b
            assert [n.id for n in ast.walk(as_laid_out) if isinstance(n, ast.Name)] == list(
                stmt.names
            )
        else:
            assert ast.dump(as_laid_out) == ast.dump(as_said)


@given(NAMES, st.lists(NAMES | st.sampled_from(["*", "__vllm_submods__"]), max_size=6, unique=True))
@settings(max_examples=100, deadline=None)
def test_signatures_are_laid_out_as_black_would(name: str, parameters: list[str]) -> None:
    parameters = [p for p in parameters if p != "*"]
    text = signature_text(name, parameters, known=True)
    assert format_source(f"{text}\n    pass\n") == f"{text}\n    pass\n"
    assert text == signature_text(name, parameters, known=False)


@given(LITERALS)
@settings(max_examples=300, deadline=None)
def test_literals_read_back_as_they_are(value: object) -> None:
    text = literal_text(value)
    assert text.isascii() and "\n" not in text
    if isinstance(value, complex) and value.real == 0:
        return  # which complex numbers are literals is for `consts` to say
    back = eval(text)
    assert type(back) is type(value) and repr(back) == repr(value)


@pytest.mark.parametrize("length", range(84, 97))
def test_the_last_column_is_used_and_not_the_one_after(length: int) -> None:
    text = call_layout("f", ["a" * (length - 3)])
    assert text is not None
    assert ("\n" in text) == (4 + length > 100)
    assert format_statements([f"f({'a' * (length - 3)})"]) == [text]
