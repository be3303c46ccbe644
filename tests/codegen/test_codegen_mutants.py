"""Systematic mutants of emitted sources: translation validation must refuse every one that means something else."""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from piecework.codegen import verify
from piecework.errors import EmitError
from piecework.golden.cases import LoadedCase, discover

CASES = Path(__file__).parents[2] / "golden" / "cases"


@cache
def loaded_cases() -> tuple[LoadedCase, ...]:
    """The hand-written graphs; captured models need a capture, and have the same kinds of statements."""
    written = [c for c in discover(CASES) if "def build(" in (c.directory / "graph.py").read_text()]
    loaded = [case.load().stitched for case in written]
    return tuple(each for each in loaded if each is not None)


def _functions(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    for stmt in tree.body:
        if isinstance(stmt, ast.FunctionDef):
            yield stmt


def _bodies(tree: ast.Module) -> Iterator[list[ast.stmt]]:
    for function in _functions(tree):
        yield function.body


def _calls(tree: ast.Module) -> Iterator[ast.Call]:
    for function in _functions(tree):
        for node in ast.walk(function):
            if isinstance(node, ast.Call):
                yield node


def _text(node: ast.AST) -> str:
    return ast.dump(node)


def swapped_arguments(tree: ast.Module) -> Iterator[str]:
    for call in _calls(tree):
        for i in range(len(call.args) - 1):
            if _text(call.args[i]) != _text(call.args[i + 1]):
                call.args[i], call.args[i + 1] = call.args[i + 1], call.args[i]
                yield f"arguments {i} and {i + 1} swapped"
                call.args[i], call.args[i + 1] = call.args[i + 1], call.args[i]


def dropped_arguments(tree: ast.Module) -> Iterator[str]:
    for call in _calls(tree):
        if isinstance(call.func, ast.Name) and call.func.id == "slice":
            continue  # slice(1, n) is slice(1, n, None)
        for i in range(len(call.args)):
            saved = call.args.pop(i)
            yield f"argument {i} dropped"
            call.args.insert(i, saved)
        for i in range(len(call.keywords)):
            keyword = call.keywords.pop(i)
            yield f"keyword {keyword.arg} dropped"
            call.keywords.insert(i, keyword)


def dropped_statements(tree: ast.Module) -> Iterator[str]:
    for body in _bodies(tree):
        for i, stmt in enumerate(body):
            del body[i]
            if body and not isinstance(stmt, ast.Delete):  # a value may live longer
                yield f"dropped: {ast.unparse(stmt)[:60]}"
            body.insert(i, stmt)


def duplicated_statements(tree: ast.Module) -> Iterator[str]:
    for body in _bodies(tree):
        for i, stmt in enumerate(body):
            body.insert(i, copy.deepcopy(stmt))
            yield f"twice: {ast.unparse(stmt)[:60]}"
            del body[i]


def exchanged_statements(tree: ast.Module) -> Iterator[str]:
    for body in _bodies(tree):
        for i in range(len(body) - 1):
            if isinstance(body[i], ast.Delete):
                continue
            body[i], body[i + 1] = body[i + 1], body[i]
            yield f"exchanged: {ast.unparse(body[i])[:60]}"
            body[i], body[i + 1] = body[i + 1], body[i]


def changed_constants(tree: ast.Module) -> Iterator[str]:
    parts: set[ast.expr] = set()
    for function in _functions(tree):
        for node in ast.walk(function):
            if isinstance(node, ast.BinOp) and isinstance(node.left, ast.Constant):
                parts.add(node.left)  # 2.0 - 3j is 2 - 3j
            if not isinstance(node, ast.Constant):
                continue
            value = node.value
            for other in _near(value):
                if node in parts and other == value:
                    continue
                node.value = other
                yield f"{value!a} becomes {other!a}"
                node.value = value


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
        parameters = [each.arg for each in function.args.args]
        live = list(parameters)
        for stmt in function.body:
            if isinstance(stmt, ast.Delete):
                gone = {each.id for each in stmt.targets if isinstance(each, ast.Name)}
                live = [name for name in live if name not in gone]
                continue
            for node in ast.walk(stmt):
                if (
                    isinstance(node, ast.Name)
                    and isinstance(node.ctx, ast.Load)
                    and node.id in live
                ):
                    saved = node.id
                    others = [name for name in live if name != saved]
                    for other in others[-2:]:
                        node.id = other
                        yield f"{saved} becomes {other} in {ast.unparse(stmt)[:60]}"
                    node.id = saved
            live += [
                node.id
                for node in ast.walk(stmt)
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
            ]


def other_callables(tree: ast.Module) -> Iterator[str]:
    for call in _calls(tree):
        match call.func:
            case ast.Attribute(attr=name):
                call.func.attr = "sin" if name != "sin" else "cos"
                yield f"{name} becomes {call.func.attr}"
                call.func.attr = name
            case ast.Subscript(slice=ast.Constant(value=int(index))):
                call.func.slice = ast.Constant(value=index + 1)
                yield f"index {index} becomes {index + 1}"
                call.func.slice = ast.Constant(value=index)
            case ast.Name(id=name):
                call.func.id = "repr"
                yield f"{name} becomes repr"
                call.func.id = name


def other_operators(tree: ast.Module) -> Iterator[str]:
    for function in _functions(tree):
        for node in ast.walk(function):
            if isinstance(node, ast.BinOp):
                saved = node.op
                node.op = ast.Sub() if not isinstance(saved, ast.Sub) else ast.Add()
                yield f"operator {type(saved).__name__} changed"
                node.op = saved
                node.left, node.right = node.right, node.left
                if _text(node.left) != _text(node.right):
                    yield "operands exchanged"
                node.left, node.right = node.right, node.left
            elif isinstance(node, ast.Compare):
                operators = node.ops
                node.ops = [ast.Lt() if not isinstance(operators[0], ast.Lt) else ast.Gt()]
                yield "comparison changed"
                node.ops = operators


def changed_results(tree: ast.Module) -> Iterator[str]:
    for function in _functions(tree):
        last = function.body[-1]
        if not isinstance(last, ast.Return):
            continue
        saved = last.value
        if saved is not None and _text(saved) != _text(ast.Constant(value=None)):
            last.value = ast.Constant(value=None)
            yield "returns None"
            last.value = ast.Tuple(elts=[saved], ctx=ast.Load())
            yield "returns a tuple of it"
            last.value = saved
        if isinstance(saved, (ast.Tuple, ast.List)) and len(saved.elts) > 1:
            if _text(saved.elts[0]) != _text(saved.elts[-1]):
                saved.elts.reverse()
                yield "returns in reverse"
                saved.elts.reverse()
            if function.name != "execution_fn":
                continue  # it is unpacked where it is called, so that list and tuple are one
            kind = ast.List if isinstance(saved, ast.Tuple) else ast.Tuple
            last.value = kind(elts=saved.elts, ctx=ast.Load())
            yield f"returns a {kind.__name__}"
            last.value = saved


def changed_unpacking(tree: ast.Module) -> Iterator[str]:
    for body in _bodies(tree):
        for stmt in body:
            if isinstance(stmt, ast.Assign) and isinstance(stmt.targets[0], ast.Tuple):
                names = stmt.targets[0].elts
                if len(names) > 1:
                    names.append(names.pop(0))
                    yield "unpacks in another order"
                    names.insert(0, names.pop())
                names.append(ast.Name(id="another", ctx=ast.Store()))
                yield "unpacks to one more"
                names.pop()
                if isinstance(names[0], ast.Name):
                    saved, stmt.targets[0] = stmt.targets[0], names[0]
                    yield "does not unpack"
                    stmt.targets[0] = saved


def changed_parameters(tree: ast.Module) -> Iterator[str]:
    for function in _functions(tree):
        args = function.args.args
        for i in range(len(args) - 1):
            args[i], args[i + 1] = args[i + 1], args[i]
            yield f"parameters {args[i].arg} and {args[i + 1].arg} exchanged"
            args[i], args[i + 1] = args[i + 1], args[i]
        if function.args.defaults:
            saved = function.args.defaults[-1]
            function.args.defaults[-1] = ast.Constant(value=99)
            yield "another default"
            function.args.defaults[-1] = saved
            first = function.args.defaults.pop(0)
            yield "a default less"
            function.args.defaults.insert(0, first)


def changed_module_level(tree: ast.Module) -> Iterator[str]:
    for i, stmt in enumerate(tree.body):
        if isinstance(stmt, ast.Assign):
            saved = stmt.value
            stmt.value = ast.Name(id="print", ctx=ast.Load())
            yield f"alias {ast.unparse(stmt.targets[0])} is print"
            stmt.value = saved
        if isinstance(stmt, ast.FunctionDef):
            del tree.body[i]
            yield f"function {stmt.name} dropped"
            tree.body.insert(i, stmt)


def injected_calls(tree: ast.Module) -> Iterator[str]:
    for body in _bodies(tree):
        for text in (
            "print('x')",
            "import os",
            "__vllm_consts__[0] = 1",
            "x = [y for y in ()]",
            "global torch",
        ):
            body.insert(0, ast.parse(text).body[0])
            yield f"injected: {text}"
            del body[0]


KINDS = (
    swapped_arguments,
    dropped_arguments,
    dropped_statements,
    duplicated_statements,
    exchanged_statements,
    changed_constants,
    other_operands,
    other_callables,
    other_operators,
    changed_results,
    changed_unpacking,
    changed_parameters,
    changed_module_level,
    injected_calls,
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
