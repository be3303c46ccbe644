"""The layout of statements is black's own, whatever their form, length and digits."""

from __future__ import annotations

import ast
import dataclasses
from textwrap import indent

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from piecework.codegen.plan import ir
from piecework.codegen.plan.formatting import format_source, format_statements
from piecework.codegen.plan.literals import literal_text
from piecework.codegen.plan.one_line import expr_text, stmt_text
from piecework.codegen.proof.read_ir import read_expression

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
        st.builds(ir.Call, st.integers(0, 9).map(ir.Const), items.map(ir.Arguments)),
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


CALLEES = st.one_of(
    st.sampled_from(["torch.ops.aten.add.Tensor", "attention", "len"]).map(ir.Global),
    st.builds(ir.Attribute, exprs(1), st.sampled_from(["view", "add_", "a b", "lambda"])),
)
SIGNS = ["+", "-", "*", "**", "@", "<<", "<", "==", "%", "//", "and", "or", "is not"]
OPERANDS = st.one_of(VALUES, LITERALS.map(ir.Literal))
OPERATIONS = st.recursive(
    OPERANDS,
    lambda inner: st.one_of(
        st.builds(ir.Operation, st.sampled_from(SIGNS), st.tuples(inner, inner)),
        st.builds(ir.Operation, st.sampled_from(["-", "+", "~", "not"]), st.tuples(VALUES)),
        st.builds(ir.Operation, st.just("if"), st.tuples(inner, inner, inner)),
    ),
    max_leaves=4,
)


def assign(value: st.SearchStrategy[ir.Expr]) -> st.SearchStrategy[ir.Stmt]:
    targets = st.one_of(st.just(()), NAMES.map(lambda name: (name,)))
    return st.builds(ir.Assign, targets, st.just(False), value)


STATEMENTS: st.SearchStrategy[ir.Stmt] = st.one_of(
    call(ir.CallSubmod, st.integers(0, 300), ARGUMENTS),
    call(ir.CallInlined, NAMES, ARGUMENTS, st.booleans()),
    call(ir.Assign, st.builds(ir.Call, CALLEES, ARGUMENTS)),
    assign(st.builds(ir.Item, VALUES, exprs())),
    assign(st.builds(ir.Attribute, VALUES, st.sampled_from(["shape", "ndim"]))),
    assign(OPERATIONS.filter(lambda each: isinstance(each, ir.Operation))),
    st.lists(NAMES, min_size=1, max_size=5, unique=True).map(lambda names: ir.Delete(tuple(names))),
    exprs().map(ir.Return),
    st.builds(ir.If, OPERATIONS, exprs().map(lambda value: (ir.Return(value),))),
)


def laid_out(statements: list[ir.Stmt], depth: int = 0) -> list[str]:
    return format_statements([(stmt_text(stmt), depth) for stmt in statements])


@given(st.lists(STATEMENTS, min_size=1, max_size=6), st.integers(0, 3))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_statements_are_laid_out_as_black_would(statements: list[ir.Stmt], depth: int) -> None:
    for stmt, text in zip(statements, laid_out(statements, depth), strict=True):
        heads = "".join(f"{'    ' * level}if block:\n" for level in range(1, depth + 1))
        margin = "    " * (depth + 1)
        whole = indent(f"{stmt_text(stmt)}\n", margin)
        expected = format_source(f"def function():\n{heads}{whole}").splitlines()[depth + 1 :]
        assert text.splitlines() == [line[len(margin) :] for line in expected]


@given(st.lists(STATEMENTS, min_size=1, max_size=3))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_layout_changes_no_meaning(statements: list[ir.Stmt]) -> None:
    for stmt, text in zip(statements, laid_out(statements), strict=True):
        as_laid_out = ast.parse("def f():\n" + indent(text, "    "))
        as_said = ast.parse("def f():\n" + indent(stmt_text(stmt), "    "))
        if isinstance(stmt, ir.Delete):  # del (a, b) is del a, b
            assert [n.id for n in ast.walk(as_laid_out) if isinstance(n, ast.Name)] == list(
                stmt.names
            )
        else:
            assert ast.dump(as_laid_out) == ast.dump(as_said)


class AsWritten:
    """`Words` that stand for themselves."""

    def name(self, name: str) -> ir.Expr:
        return ir.Name(name)

    def attribute(self, value: ir.Expr, name: str) -> ir.Expr:
        return ir.Attribute(value, name)

    def value(self, value: object, wish: str = "") -> ir.Expr:
        return ir.Literal(value)


def conjunctions_flat(expr: object) -> object:
    """``expr`` with one conjunction for those in each other, wherever it stands."""
    if isinstance(expr, tuple):
        return tuple(map(conjunctions_flat, expr))
    if not dataclasses.is_dataclass(expr) or isinstance(expr, type):
        return expr
    parts = {f.name: conjunctions_flat(getattr(expr, f.name)) for f in dataclasses.fields(expr)}
    found = dataclasses.replace(expr, **parts)
    if not isinstance(found, ir.Operation) or found.sign != "and":
        return found
    operands: list[ir.Expr] = []
    for each in found.operands:
        inner = isinstance(each, ir.Operation) and each.sign == "and"
        operands += each.operands if inner else (each,)  # type: ignore[union-attr]
    return ir.Operation("and", tuple(operands))


READABLE = st.one_of(NAMES.map(ir.Name), LITERALS.filter(lambda v: type(v) is not complex).map(ir.Literal))  # fmt: skip
TREES = st.recursive(
    READABLE,
    lambda inner: st.one_of(
        st.builds(ir.Operation, st.sampled_from(SIGNS), st.tuples(inner, inner)),
        st.builds(
            ir.Operation, st.sampled_from(["<=", "and", "or"]), st.tuples(inner, inner, inner)
        ),
        st.builds(ir.Operation, st.sampled_from(["-", "~", "not"]), st.tuples(NAMES.map(ir.Name))),
        st.builds(ir.Operation, st.just("not"), st.tuples(inner)),
        st.builds(ir.Operation, st.just("if"), st.tuples(inner, inner, inner)),
        st.builds(ir.Attribute, inner, st.just("shape")),
        st.builds(ir.Item, inner, inner),
        st.builds(ir.Call, NAMES.map(ir.Name), st.builds(ir.Arguments, st.tuples(inner))),
    ),
    max_leaves=8,
)


@given(TREES)
@settings(max_examples=300, deadline=None)
def test_a_text_reads_back_as_the_expression_that_it_is(expr: ir.Expr) -> None:
    node = ast.parse(expr_text(expr), mode="eval").body
    read = read_expression(node, AsWritten(), {})
    assert repr(conjunctions_flat(read)) == repr(conjunctions_flat(expr))


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
    (text,) = format_statements([(f"f({'a' * (length - 3)})", 0)])
    assert ("\n" in text) == (4 + length > 100)


@pytest.mark.parametrize("digits", ["1", "12", "9007199254740993"])
def test_digits_are_put_back_where_they_were(digits: str) -> None:
    """Also where black adds parentheses, commas and lines, and in what looks like an escape or an exponent."""
    names = [f"hidden_states_{place}_{digits}" for place in range(7)]
    text = f"call({', '.join(names)}, 1.5e-7, -{digits}, '\\x41', b'\\x07', {digits}j)"
    for one in (f"{names[0]} = {text}", f"del {', '.join(names)}", f"x{digits} = y ** {digits}"):
        (found,) = format_statements([(one, 0)])
        lines = format_source(f"def f():\n    {one}\n").splitlines()[1:]
        assert found.splitlines() == [line[4:] for line in lines]
