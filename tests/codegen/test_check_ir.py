"""The plan is checked before it is written: each kind of defect is an error that names the statement."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.fx

from piecework.codegen.plan import ir
from piecework.codegen.plan.check import check_ir
from piecework.codegen.plan.liveness import insert_deletes, last_uses
from piecework.codegen.stitch.lower import lower
from piecework.errors import EmitError

O = ir.Origin()  # noqa: E741


def sin(target: str | None, argument: ir.Expr) -> ir.Stmt:
    call = ir.Call(ir.Global("torch.sin"), ir.Arguments((argument,)))
    return ir.Assign(() if target is None else (target,), False, call, O)


def module(*body: ir.Stmt, functions: tuple[ir.Function, ...] = (), **changes: object) -> ir.Module:
    entry = ir.Function(
        "execution_fn", (ir.Parameter("x"),), body or (ir.Return(ir.Name("x"), O),), True
    )
    return replace(ir.Module(("torch",), (), functions, entry, ("submod_0",), (ir.ConstSpec(0, "c"),)), **changes)  # type: ignore[arg-type]


RETURN = ir.Return(ir.Name("x"), O)
INNER = ir.Function("inner", (ir.Parameter("a"),), (ir.Return(ir.Name("a"), O),), False)
INNER_SUBMODS = ir.Function(
    "inner",
    (ir.Parameter("a"),),
    (ir.CallSubmod((), False, 0, ir.Arguments(), O), ir.Return(ir.Name("a"), O)),
    True,
)


def inlined(function: str = "inner", passes: bool = False, count: int = 1) -> ir.Stmt:
    return ir.CallInlined(
        (), False, function, ir.Arguments(tuple(ir.Name("x") for _ in range(count))), passes, O
    )


def test_sound_plans_pass() -> None:
    check_ir(module(), 1)
    check_ir(module(sin("y", ir.Name("x")), sin(None, ir.Name("y")), ir.Delete(("y",)), RETURN), 1)
    check_ir(module(inlined(), RETURN, functions=(INNER,)), 1)
    check_ir(module(inlined(passes=True), RETURN, functions=(INNER_SUBMODS,)), 1)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (module(sin("y", ir.Name("z")), RETURN), "'z' is used before it is defined"),
        (
            module(sin("y", ir.Name("x")), ir.Delete(("y",)), sin(None, ir.Name("y")), RETURN),
            "'y' is used after its del",
        ),
        (module(ir.Delete(("y",)), RETURN), "del of 'y', which is not defined"),
        (module(sin("y", ir.Name("x")), sin("y", ir.Name("x")), RETURN), "'y' is defined twice"),
        (module(sin("x", ir.Name("x")), RETURN), "'x' is defined twice"),
        (module(sin("torch", ir.Name("x")), RETURN), "'torch' shadows"),
        (module(sin("len", ir.Name("x")), RETURN), "'len' shadows"),
        (module(sin("__vllm_consts__", ir.Name("x")), RETURN), "shadows"),
        (module(sin("a b", ir.Name("x")), RETURN), "is no valid name"),
        (module(sin("y", ir.Const(1)), RETURN), "no constant 1"),
        (module(sin("y", ir.ListExpr((ir.TupleExpr((ir.Const(-1),)),))), RETURN), "no constant -1"),
        (
            module(
                sin(
                    "y",
                    ir.DictExpr(
                        ((ir.Literal(1), ir.SliceExpr(ir.Name("z"), ir.Literal(1), ir.Literal(1))),)
                    ),
                ),
                RETURN,
            ),
            "'z' is used before",
        ),
        (module(sin("y", ir.Literal(float("inf"))), RETURN), "a float has no literal form"),
        (module(sin("y", ir.Literal([1])), RETURN), "a list has no literal form"),
        (
            module(sin("y", ir.Global("math.sin")), RETURN),
            "'math.sin' is neither imported nor defined",
        ),
        (module(ir.CallSubmod((), False, 1, ir.Arguments(), O), RETURN), "no submodule 1"),
        (
            module(ir.CallSubmod(("a", "b"), False, 0, ir.Arguments(), O), RETURN),
            "targets and unpacking",
        ),
        (module(ir.CallSubmod((), True, 0, ir.Arguments(), O), RETURN), "targets and unpacking"),
        (
            module(ir.Assign(("y",), False, ir.Attribute(ir.Name("x"), "a b"), O), RETURN),
            "is no identifier",
        ),
        (module(sin("y", ir.Name("x"))), "must end with its only return"),
        (module(RETURN, RETURN), "must end with its only return"),
        (module(inlined(), RETURN), "'inner' is called before it is defined"),
        (module(inlined(count=2), RETURN, functions=(INNER,)), "gets other arguments"),
        (module(inlined(), RETURN, functions=(INNER_SUBMODS,)), "not passed as declared"),
        (
            module(RETURN, functions=(replace(INNER_SUBMODS, takes_submods=False),)),
            "is not a parameter of this function",
        ),
        (module(RETURN, functions=(INNER, INNER)), "is taken or not valid"),
        (module(RETURN, functions=(replace(INNER, body=()),)), "must end with its only return"),
        (module(imports=("torch; evil",)), "is no dotted name"),
        (module(aliases=(ir.Alias("torch", ir.Const(0)),)), "is taken or not valid"),
        (module(aliases=(ir.Alias("f", ir.Const(5)),)), "no constant 5"),
        (module(bound=(ir.BoundName("print", "w"),)), "is taken or not valid"),
        (module(const_specs=()), "does not number the constants"),
        (module(entry=INNER), "the entry must be execution_fn"),
    ],
)
def test_defects_are_found(plan: ir.Module, message: str) -> None:
    with pytest.raises(EmitError, match=message):
        check_ir(plan, 1)


def test_a_bound_name_is_alive_and_is_never_deleted() -> None:
    bound = (ir.BoundName("w", "layer.weight"),)
    check_ir(module(sin(None, ir.Name("w")), RETURN, bound=bound), 1)
    with pytest.raises(EmitError, match="del of 'w'"):
        check_ir(module(ir.Delete(("w",)), RETURN, bound=bound), 1)


# --- liveness ------------------------------------------------------------------------------------


def test_values_die_after_their_last_use_and_results_do_not() -> None:
    body = (
        sin("a", ir.Name("x")),
        sin("b", ir.Name("a")),
        sin("unused", ir.Name("a")),
        sin("c", ir.TupleExpr((ir.Name("b"), ir.Name("b")))),
        ir.Return(ir.ListExpr((ir.Name("c"), ir.Name("x"))), O),
    )
    assert last_uses(body) == {"a": 2, "b": 3, "unused": 2, "c": 4, "x": 4}
    out = insert_deletes(body, frozenset({"x"}))
    deletes = [(index, stmt.names) for index, stmt in enumerate(out) if isinstance(stmt, ir.Delete)]
    assert deletes == [(3, ("a", "unused")), (5, ("b",))]


def test_parameters_are_borrowed() -> None:
    body = (sin("a", ir.Name("x")), ir.Return(ir.Name("a"), O))
    assert insert_deletes(body, frozenset({"x"})) == body


def test_memory_never_peaks_above_the_interpreters() -> None:
    """Every activation is released as early as reference counting could (B7)."""
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    for _ in range(5):
        x = graph.call_function(torch.add, (graph.call_function(torch.sin, (x,)), 1))
    graph.output(x)
    plan, _ = lower(torch.fx.GraphModule(torch.nn.Module(), graph))
    alive: set[str] = set()
    peak = 0
    for stmt in plan.entry.body:
        if isinstance(stmt, ir.Delete):
            alive -= set(stmt.names)
        elif not isinstance(stmt, ir.Return):
            assert isinstance(stmt, ir.Assign)
            alive |= {stmt.targets[0]}
        peak = max(peak, len(alive))
    assert peak == 2


# --- regions -------------------------------------------------------------------------------------

ENTER = sin("r", ir.Name("x"))
LEAVE = ir.Finally(sin(None, ir.Name("r")))  # type: ignore[arg-type]


def test_a_region_is_entered_left_and_nested() -> None:
    inner = (sin("q", ir.Name("x")), ir.Try(), ir.Finally(sin(None, ir.Name("q"))))  # type: ignore[arg-type]
    check_ir(module(ENTER, ir.Try(), *inner, LEAVE, RETURN), 1)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ((ir.Try(), LEAVE, RETURN), "without a call that enters it"),
        ((ENTER, ir.Delete(("r",)), ir.Try(), RETURN), "without a call that enters it"),
        ((ENTER, LEAVE, RETURN), "ends that has not begun"),
        ((ENTER, ir.Try(), RETURN), "does not end before the return"),
        ((ENTER, ir.Try(), sin("y", ir.Name("x")), ir.Finally(sin(None, ir.Name("y"))), RETURN), "may not exist yet"),  # type: ignore[arg-type]
        ((ENTER, ir.Try(), ir.Finally(sin("y", ir.Name("r"))), RETURN), "or to get one"),  # type: ignore[arg-type]
        ((ENTER, ir.Try(), ir.Delete(("r",)), LEAVE, RETURN), "after its del"),
        (tuple(s for i in range(17) for s in (sin(f"r{i}", ir.Name("x")), ir.Try())), "more than 16 regions"),
    ],
)  # fmt: skip
def test_regions_that_do_not_fit_are_found(body: tuple[ir.Stmt, ...], message: str) -> None:
    with pytest.raises(EmitError, match=message):
        check_ir(module(*body), 1)


def test_what_dies_where_a_region_is_entered_is_deleted_inside() -> None:
    body = (sin("y", ir.Name("x")), sin("r", ir.Name("y")), ir.Try(), LEAVE, RETURN)
    kinds = [type(stmt).__name__ for stmt in insert_deletes(body, frozenset({"x"}))]
    assert kinds == ["Assign", "Assign", "Try", "Delete", "Finally", "Delete", "Return"]
