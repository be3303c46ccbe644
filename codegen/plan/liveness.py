"""When a value dies. In: the statements of one function. Out: the same statements with `Delete`s after each value's last use.

Parameters are borrowed from the caller and never deleted; a name that is returned is never deleted either.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import assert_never

from piecework.codegen.plan import ir


def parts_of(expr: ir.Expr) -> tuple[ir.Expr, ...]:
    """The expressions directly in ``expr``, in order of evaluation."""
    match expr:
        case ir.Name() | ir.Literal() | ir.Const() | ir.Global():
            return ()
        case ir.ListExpr(items) | ir.TupleExpr(items) | ir.SetExpr(items) | ir.Operation(_, items):
            return tuple(items)
        case ir.DictExpr(pairs):
            return tuple(each for pair in pairs for each in pair)
        case ir.SliceExpr(start, stop, step):
            return (start, stop, step)
        case ir.Attribute(value) | ir.Star(_, value):
            return (value,)
        case ir.Item(value, index):
            return (value, index)
        case ir.Call(function, arguments):
            return (function, *arguments.args, *(value for _, value in arguments.kwargs))
        case _:
            assert_never(expr)


def names_in(expr: ir.Expr) -> Iterator[str]:
    """The local names that ``expr`` reads, in order, repeats included."""
    if isinstance(expr, ir.Name):
        yield expr.id
    else:
        for part in parts_of(expr):
            yield from names_in(part)


def operands(stmt: ir.Stmt) -> tuple[ir.Expr, ...]:
    """The expressions that ``stmt`` evaluates, in order of evaluation."""
    match stmt:
        case ir.CallSubmod(arguments=arguments) | ir.CallInlined(arguments=arguments):
            return (*arguments.args, *(value for _, value in arguments.kwargs))
        case ir.Assign(value=value) | ir.Return(value=value):
            return (value,)
        case ir.If(first, body) | ir.With(first, body):
            return (first, *(each for inner in body for each in operands(inner)))
        case ir.Finally(call=call):
            return operands(call)
        case ir.Try() | ir.Delete():
            return ()
        case _:
            assert_never(stmt)


def uses(stmt: ir.Stmt) -> Iterator[str]:
    """The local names that ``stmt`` reads."""
    for expr in operands(stmt):
        yield from names_in(expr)


def definitions(stmt: ir.Stmt) -> tuple[str, ...]:
    """The local names that ``stmt`` binds."""
    match stmt:
        case ir.Assign(targets) | ir.CallSubmod(targets) | ir.CallInlined(targets):
            return tuple(targets)
        case ir.If() | ir.With() | ir.Try() | ir.Finally() | ir.Delete() | ir.Return():
            return ()
        case _:
            assert_never(stmt)


def last_uses(body: Iterable[ir.Stmt]) -> dict[str, int]:
    """Map each name to the index of the last statement that reads or binds it."""
    last: dict[str, int] = {}
    for index, stmt in enumerate(body):
        for name in (*definitions(stmt), *uses(stmt)):
            last[name] = index
    return last


def insert_deletes(body: tuple[ir.Stmt, ...], borrowed: frozenset[str]) -> tuple[ir.Stmt, ...]:
    """Return ``body`` with a `Delete` after the last use of every name outside ``borrowed``."""
    last = last_uses(body)
    kept = borrowed | {name for stmt in body if isinstance(stmt, ir.Return) for name in uses(stmt)}
    dying: dict[int, list[str]] = {}
    for stmt in body:  # order of definition, so that the text is stable
        for name in definitions(stmt):
            if name not in kept:
                dying.setdefault(last[name], []).append(name)
    out: list[ir.Stmt] = []
    for index, stmt in enumerate(body):
        out.append(stmt)
        opens = index + 1 < len(body) and isinstance(body[index + 1], ir.Try)
        after = index - 1 if isinstance(stmt, ir.Try) else index  # nothing stands before a `try`
        if after in dying and not opens:
            out.append(ir.Delete(tuple(dying[after])))
    return tuple(out)
