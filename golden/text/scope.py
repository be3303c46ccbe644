"""Names that emitted source reads before they exist. In: its text and the names that binding provides. Out: one sentence per problem.

Emitted functions are straight lines, so every read is checked against what is bound at that point, deletions included. Attributes of
modules are not looked up; execution finds those.
"""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterable, Iterator

_PROVIDED = frozenset({"__vllm_consts__", "__name__"}) | frozenset(dir(builtins))


def undefined_names(code: str, provided: Iterable[str] = ()) -> list[str]:
    """Reads of names that are not bound, each as ``line 4: 'x' is not defined``.

    Args:
        code: the text of a module.
        provided: names that are put into the module before it runs (bound weights).

    Raises:
        SyntaxError: the text is not Python.
    """
    tree = ast.parse(code)
    known = set(_PROVIDED) | set(provided)
    problems: list[str] = []
    functions: list[ast.FunctionDef] = []
    for stmt in tree.body:
        if isinstance(stmt, ast.FunctionDef):
            functions.append(stmt)
            _check(_signature(stmt), known, problems)
            known.add(stmt.name)
        else:
            _check(stmt, known, problems)
    for function in functions:  # their bodies run when the whole module is defined
        local = {arg.arg for arg in ast.walk(function.args) if isinstance(arg, ast.arg)}
        hidden = local | set(_bound_in(function.body))
        bound = (known - hidden) | local
        for stmt in function.body:
            _check(stmt, bound, problems)
    return problems


def _signature(function: ast.FunctionDef) -> ast.AST:
    """The parts of a definition that are evaluated where it stands."""
    parts = [*function.decorator_list, *function.args.defaults, *function.args.kw_defaults]
    return ast.Tuple([part for part in parts if part is not None], ast.Load())


def _check(stmt: ast.AST, bound: set[str], problems: list[str]) -> None:
    """Report unbound reads of ``stmt`` and update ``bound`` with what it binds and deletes."""
    if isinstance(stmt, (ast.If, ast.For, ast.While, ast.With, ast.Try)):
        _check_block(stmt, bound, problems)
        return
    inner = set(_inner_names(stmt))
    for node in _in_order(stmt):
        if not isinstance(node, ast.Name) or node.id in inner:
            continue
        if isinstance(node.ctx, (ast.Load, ast.Del)) and node.id not in bound:
            problems.append(f"line {node.lineno}: {node.id!a} is not defined")
    for node in ast.walk(stmt):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            bound.add(node.id)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Del):
            bound.discard(node.id)
        elif isinstance(node, ast.alias):
            bound.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            bound.add(node.name)


def _check_block(stmt: ast.stmt, bound: set[str], problems: list[str]) -> None:
    """A compound statement: its head, then its bodies one after the other (an edited file may have one)."""
    for _, value in ast.iter_fields(stmt):
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, ast.ExceptHandler):
                bound |= {each.name} if each.name else set()
                for inner in each.body:
                    _check(inner, bound, problems)
            elif isinstance(each, ast.AST):
                _check(each, bound, problems)


def _inner_names(stmt: ast.AST) -> Iterator[str]:
    """Names bound by lambdas, comprehensions and nested functions inside ``stmt``."""
    for node in ast.walk(stmt):
        if isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.comprehension):
            yield from (n.id for n in ast.walk(node.target) if isinstance(n, ast.Name))
        elif isinstance(node, ast.FunctionDef):
            yield from _bound_in(node.body)


def _bound_in(body: Iterable[ast.stmt]) -> Iterator[str]:
    """Names that the statements bind or delete: in a function, its local ones."""
    for stmt in body:
        for node in ast.walk(stmt):
            if isinstance(node, ast.Name) and isinstance(node.ctx, (ast.Store, ast.Del)):
                yield node.id


def _in_order(stmt: ast.AST) -> list[ast.AST]:
    return sorted(
        ast.walk(stmt), key=lambda n: (getattr(n, "lineno", 0), getattr(n, "col_offset", 0))
    )
