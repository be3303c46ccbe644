"""Systematic mutants of emitted sources: translation validation must refuse every one that means something else."""

from __future__ import annotations

import ast
import copy
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TypeVar

import pytest
import torch.fx
from hypothesis import given, settings
from hypothesis import strategies as st
from random_graphs import SETTINGS, programs, surprises

from piecework.codegen import LowerOptions, generate_source, verify
from piecework.errors import EmitError
from piecework.golden.cases import LoadedCase, discover

T = TypeVar("T")
Node = TypeVar("Node", bound=ast.AST)
CASES = Path(__file__).parents[2] / "golden" / "cases"


@cache
def loaded_cases() -> tuple[LoadedCase, ...]:
    """The hand-written graphs; captured models need a capture, and have the same kinds of statements."""
    written = [c for c in discover(CASES) if "def build(" in (c.directory / "graph.py").read_text()]
    loaded = [case.load().stitched for case in written]
    return tuple(each for each in loaded if each is not None)


def _functions(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    return (each for each in tree.body if isinstance(each, ast.FunctionDef))


def _nodes(tree: ast.Module, kind: type[Node]) -> Iterator[Node]:
    for function in _functions(tree):
        yield from (node for node in ast.walk(function) if isinstance(node, kind))


def _with(what: str, owner: ast.AST, **fields: object) -> Iterator[str]:
    """One mutant: ``owner`` with other fields, for as long as it is looked at."""
    saved = {name: getattr(owner, name) for name in fields}
    vars(owner).update(fields)
    yield what
    vars(owner).update(saved)


def _same(left: ast.AST, right: ast.AST) -> bool:
    return ast.dump(left) == ast.dump(right)


def _exchanged(items: list[T], i: int) -> list[T]:
    return [*items[:i], items[i + 1], items[i], *items[i + 2 :]]


def _without(items: list[T], i: int) -> list[T]:
    return items[:i] + items[i + 1 :]


def swapped_arguments(tree: ast.Module) -> Iterator[str]:
    for call in _nodes(tree, ast.Call):
        for i in range(len(call.args) - 1):
            if not _same(call.args[i], call.args[i + 1]):
                yield from _with(f"argument {i} swapped", call, args=_exchanged(call.args, i))


def dropped_arguments(tree: ast.Module) -> Iterator[str]:
    for call in _nodes(tree, ast.Call):
        if isinstance(call.func, ast.Name) and call.func.id == "slice":
            continue  # slice(1, n) is slice(1, n, None)
        for i in range(len(call.args)):
            yield from _with(f"argument {i} dropped", call, args=_without(call.args, i))
        for i, each in enumerate(call.keywords):
            yield from _with(f"{each.arg} dropped", call, keywords=_without(call.keywords, i))


def dropped_statements(tree: ast.Module) -> Iterator[str]:
    for function in _functions(tree):
        for i, stmt in enumerate(function.body):
            if len(function.body) > 1 and not isinstance(stmt, ast.Delete):  # it may live longer
                what = f"dropped: {ast.unparse(stmt)[:60]}"
                yield from _with(what, function, body=_without(function.body, i))


def duplicated_statements(tree: ast.Module) -> Iterator[str]:
    for function in _functions(tree):
        for i, stmt in enumerate(function.body):
            twice = [*function.body[:i], copy.deepcopy(stmt), *function.body[i:]]
            yield from _with(f"twice: {ast.unparse(stmt)[:60]}", function, body=twice)


def exchanged_statements(tree: ast.Module) -> Iterator[str]:
    for function in _functions(tree):
        for i, stmt in enumerate(function.body[:-1]):
            if not isinstance(stmt, ast.Delete):
                what = f"exchanged: {ast.unparse(function.body[i + 1])[:60]}"
                yield from _with(what, function, body=_exchanged(function.body, i))


def changed_constants(tree: ast.Module) -> Iterator[str]:
    parts = {each.left for each in _nodes(tree, ast.BinOp)}
    for node in _nodes(tree, ast.Constant):
        for other in _near(node.value):
            if node not in parts or other != node.value:  # 2.0 - 3j is 2 - 3j
                yield from _with(f"{node.value!a} becomes {other!a}", node, value=other)


def _near(value: object) -> list[object]:
    """Constants close to ``value``, of its type and of types that compare equal to it."""
    if type(value) is bool:
        return [not value, int(value)]
    if type(value) is int:
        return [value + 1, float(value), *([bool(value)] if value in (0, 1) else [])]
    if type(value) is float:
        return [value + 1 if value < 1e300 else 0.5, complex(value)]
    if type(value) is complex:
        return [value + 1j]
    if type(value) is str:
        return [value + " ", value.encode("utf-8", "surrogatepass")]
    if type(value) is bytes:
        return [value + b"\0"]
    return [0, ...] if value is None else [None]


def other_operands(tree: ast.Module) -> Iterator[str]:
    """Each use of a value becomes a use of another one that lives there."""
    for function in _functions(tree):
        live = [each.arg for each in function.args.args]
        for stmt in function.body:
            names = [each for each in ast.walk(stmt) if isinstance(each, ast.Name)]
            if isinstance(stmt, ast.Delete):
                live = [name for name in live if name not in {each.id for each in names}]
                continue
            for node in names:
                if isinstance(node.ctx, ast.Load) and node.id in live:
                    for other in [name for name in live if name != node.id][-2:]:
                        what = f"{node.id} becomes {other} in {ast.unparse(stmt)[:60]}"
                        yield from _with(what, node, id=other)
            live += [each.id for each in names if isinstance(each.ctx, ast.Store)]


def other_callables(tree: ast.Module) -> Iterator[str]:
    for call in _nodes(tree, ast.Call):
        match call.func:
            case ast.Attribute(attr=name):
                other = "sin" if name != "sin" else "cos"
                yield from _with(f"{name} becomes {other}", call.func, attr=other)
            case ast.Subscript(slice=ast.Constant(value=int(index))):
                following = ast.Constant(value=index + 1)
                yield from _with(f"index {index} becomes the next", call.func, slice=following)
            case ast.Name(id=name):
                yield from _with(f"{name} becomes repr", call.func, id="repr")


def other_operators(tree: ast.Module) -> Iterator[str]:
    for node in _nodes(tree, ast.BinOp):
        other = ast.Sub() if not isinstance(node.op, ast.Sub) else ast.Add()
        yield from _with(f"operator {type(node.op).__name__} changed", node, op=other)
        if not _same(node.left, node.right):
            yield from _with("operands exchanged", node, left=node.right, right=node.left)
    for node in _nodes(tree, ast.Compare):
        less = ast.Lt() if not isinstance(node.ops[0], ast.Lt) else ast.Gt()
        yield from _with("comparison changed", node, ops=[less])


def changed_results(tree: ast.Module) -> Iterator[str]:
    for function in _functions(tree):
        last = function.body[-1]
        if not isinstance(last, ast.Return) or last.value is None:
            continue
        saved = last.value
        if not _same(saved, ast.Constant(value=None)):
            yield from _with("returns None", last, value=ast.Constant(value=None))
            yield from _with("returns a tuple of it", last, value=ast.Tuple([saved], ast.Load()))
        if isinstance(saved, (ast.Tuple, ast.List)) and len(saved.elts) > 1:
            if not _same(saved.elts[0], saved.elts[-1]):
                yield from _with("returns in reverse", saved, elts=saved.elts[::-1])
            if function.name != "execution_fn":
                continue  # it is unpacked where it is called, so that list and tuple are one
            kind = ast.List if isinstance(saved, ast.Tuple) else ast.Tuple
            yield from _with(f"returns a {kind.__name__}", last, value=kind(saved.elts, ast.Load()))


def changed_unpacking(tree: ast.Module) -> Iterator[str]:
    for stmt in _nodes(tree, ast.Assign):
        target = stmt.targets[0]
        if isinstance(target, ast.Tuple):
            first, *others = target.elts
            if others:
                yield from _with("unpacks in another order", target, elts=[*others, first])
            more = [*target.elts, ast.Name("another", ast.Store())]
            yield from _with("unpacks to one more", target, elts=more)
            yield from _with("does not unpack", stmt, targets=[first])


def changed_parameters(tree: ast.Module) -> Iterator[str]:
    for function in _functions(tree):
        given = function.args
        for i in range(len(given.args) - 1):
            yield from _with(f"parameter {i} exchanged", given, args=_exchanged(given.args, i))
        if given.defaults:
            other = [*given.defaults[:-1], ast.Constant(value=99)]
            yield from _with("another default", given, defaults=other)
            yield from _with("a default less", given, defaults=given.defaults[1:])


def changed_module_level(tree: ast.Module) -> Iterator[str]:
    for i, stmt in enumerate(tree.body):
        if isinstance(stmt, ast.Assign):
            what = f"alias {ast.unparse(stmt.targets[0])} is print"
            yield from _with(what, stmt, value=ast.Name("print", ast.Load()))
        if isinstance(stmt, ast.FunctionDef):
            yield from _with(f"function {stmt.name} dropped", tree, body=_without(tree.body, i))


INJECTED = (
    *("print('x')", "import os", "__vllm_consts__[0] = 1", "x = [y for y in ()]", "global torch"),
)


def injected_calls(tree: ast.Module) -> Iterator[str]:
    for function in _functions(tree):
        for text in INJECTED:
            more = [*ast.parse(text).body, *function.body]
            yield from _with(f"injected: {text}", function, body=more)


KINDS = (
    *(swapped_arguments, dropped_arguments, dropped_statements, duplicated_statements),
    *(exchanged_statements, changed_constants, other_operands, other_callables, other_operators),
    *(changed_results, changed_unpacking, changed_parameters, changed_module_level, injected_calls),
)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_no_mutant_survives(kind: Callable[[ast.Module], Iterator[str]]) -> None:
    count, survivors = 0, []
    for case in loaded_cases():
        tree = ast.parse(case.source.code)
        original = ast.unparse(tree)
        for what in kind(tree):
            mutant = ast.unparse(ast.fix_missing_locations(tree))
            # Without `return None` a function returns None all the same, and to build a slice does nothing.
            if mutant == original or what == "dropped: return None" or ": slice_" in what:
                continue
            count += 1
            try:
                verify(case.source, case.gm, edited=mutant)
            except EmitError:
                continue
            survivors.append(f"{case.case.name}: {what}\n{mutant}")
        assert ast.unparse(tree) == original, "a mutation was not undone"
    assert count >= 4
    assert not survivors, f"{len(survivors)} of {count} survive:\n" + "\n\n".join(survivors[:5])


COUNTS = {"refused": 0, "ran": 0}


@given(programs(), st.randoms(use_true_random=False))
@settings(max_examples=80, **SETTINGS)
def check_mutants(
    program: tuple[torch.fx.GraphModule, LowerOptions], chance: random.Random
) -> None:
    source = generate_source(*program)
    tree = ast.parse(source.code)
    texts = [
        ast.unparse(ast.fix_missing_locations(tree))
        for kind in KINDS
        for _ in kind(tree)
        if chance.random() < 0.15
    ]
    chance.shuffle(texts)
    for text in texts[:8]:
        try:
            verify(source, program[0], edited=text)
        except EmitError:
            COUNTS["refused"] += 1
            continue
        COUNTS["ran"] += 1
        found = surprises(program[0], source, text)
        assert not found, f"{found}\n{text}\nwas made from\n{source.code}"


def test_a_proved_mutant_of_a_random_graph_runs_as_the_graph() -> None:
    check_mutants()
    assert COUNTS["refused"] > 100 and COUNTS["ran"] > 0


@pytest.mark.parametrize("index", range(3))
def test_a_changed_constant_is_found(index: int) -> None:
    """The text says nothing of what constants are; their values are part of the proof."""
    found = 0
    for case in loaded_cases():
        consts = list(case.source.consts)
        if len(consts) <= index:
            continue
        consts[index] = object()
        found += 1
        with pytest.raises(EmitError):
            verify(replace(case.source, consts=tuple(consts)), case.gm)
    assert found >= 2
