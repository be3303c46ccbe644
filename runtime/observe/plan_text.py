"""The plan of emitted source, to be read. In: an `ir.Module`. Out: a text with one row per statement, its kind and where it comes from.

The text is for people: nothing reads it back.
"""

from __future__ import annotations

from collections.abc import Iterator

from piecework.codegen.plan import ir
from piecework.codegen.plan.one_line import expr_text, signature_text, stmt_text
from piecework.codegen.plan.render import comment_text

_INDENT = "    "


def plan_text(module: ir.Module) -> str:
    """``module`` as text: its tables first, then its functions in order of definition, the entry last."""
    return "\n".join(_lines(module)) + "\n"


def _lines(module: ir.Module) -> Iterator[str]:
    yield from module.banner
    yield from _table("imports", module.imports)
    yield from _table(
        "submods", (f"[{index}] {name}" for index, name in enumerate(module.submod_names))
    )
    yield from _table("consts", map(_const, module.const_specs))
    yield from _table(
        "bound", (f"{row.name} = {row.path}  {row.description}".rstrip() for row in module.bound)
    )
    yield from _table("aliases", map(_alias, module.aliases))
    for function in module.functions:
        yield from _function("function", function, module)
    yield from _function("entry", module.entry, module)


def _table(title: str, rows: Iterator[str] | tuple[str, ...] | map[str]) -> Iterator[str]:
    found = list(rows)
    if found:
        yield ""
        yield title
        yield from (f"{_INDENT}{row}" for row in found)


def _const(spec: ir.ConstSpec) -> str:
    origin = f" from {spec.attribute}" if spec.attribute else ""
    return f"[{spec.index}] {spec.description}{origin}"


def _alias(alias: ir.Alias) -> str:
    note = f"  # {alias.note}" if alias.note else ""
    return f"{alias.name} = {expr_text(alias.value)}{note}"


def _function(title: str, function: ir.Function, module: ir.Module) -> Iterator[str]:
    yield ""
    yield f"{title} {signature_text(function).removeprefix('def ').removesuffix(':')}"
    if function.note:
        yield f"{_INDENT}# {function.note}"
    for number, stmt in enumerate(function.body):
        yield f"{_INDENT}{number:4d}  {type(stmt).__name__:<12}  {stmt_text(stmt)}"
        origin = _origin(stmt, module)
        if origin:
            yield f"{_INDENT}{'':4}  {'':<12}    # {origin}"


def _origin(stmt: ir.Stmt, module: ir.Module) -> str:
    """What stands behind a statement: its piece, its node, and where in the model that comes from."""
    piece = module.submod_names[stmt.index] if isinstance(stmt, ir.CallSubmod) else ""
    stmt = stmt.call if isinstance(stmt, ir.Finally) else stmt
    node = "" if isinstance(stmt, (ir.Delete, ir.Try)) else stmt.origin.node
    named = f"%{node}" if node and node != piece else ""
    return "  ".join(part for part in (piece, named, comment_text(stmt)) if part)
