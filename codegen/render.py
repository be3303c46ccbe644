"""From plan to text. In: an `ir.Module`. Out: the Python source, in black's format, and the statement that each line belongs to.

Statements are laid out by `layout`; what stands around them belongs to the templates; nothing is decided that the plan did not say.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from functools import cache

import jinja2

from piecework.codegen import ir
from piecework.codegen.layout import (
    LINE_LENGTH,
    Layout,
    expr_text,
    format_source,
    numbered,
    signature_text,
)
from piecework.codegen.literals import literal_text

__all__ = [
    "FORMAT_VERSION",
    "environment",
    "flat_statements",
    "format_source",
    "line_map",
    "literal_text",
    "numbered",
    "render",
]

FORMAT_VERSION = 1

# What switches black off, or tells it or a type checker something, when it is all of a comment.
_DIRECTIVE = re.compile(r"\b(fmt|yapf|type|noqa|pragma|pylint|isort)\s*:")


@cache
def environment() -> jinja2.Environment:
    """The one Jinja environment: strict about undefined names, trimmed blocks, no autoescape (it writes Python)."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("piecework", "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=jinja2.select_autoescape(["html.jinja"], default=False),
    )


def render(module: ir.Module) -> str:
    """Write ``module`` as Python source.

    Raises:
        EmitError: black could not parse a statement (a defect of piecework; the numbered text is in the message).
    """
    template = environment().get_template("module.py.jinja")
    return template.render(
        format_version=FORMAT_VERSION,
        banner=[f"# {_comment(line)}".rstrip() for line in module.banner],
        submods=[f"[{index}] {_comment(name)}" for index, name in enumerate(module.submod_names)],
        bound=[_comment(f"{row.name}: {row.description} = {row.path}") for row in module.bound],
        **render_parts(module),
    )


def render_parts(module: ir.Module) -> dict[str, object]:
    """What every template around functions takes: constants, imports, aliases, functions and the entry."""
    layout = Layout()
    every = (*module.functions, module.entry)
    for function in every:
        for stmt, depth in with_depth(function.body):
            layout.add(stmt, depth)
    texts = iter(layout.finish())
    functions = [_function(function, [next(texts) for _ in function.body]) for function in every]
    return {
        "consts": [_const_row(spec) for spec in module.const_specs],
        "imports": module.imports,
        "aliases": [
            {"code": _alias(alias), "note": _comment(alias.note)} for alias in module.aliases
        ],
        "functions": functions[:-1],
        "entry": functions[-1],
    }


def _function(function: ir.Function, texts: list[str]) -> str:
    parameters = [_parameter(p) for p in function.parameters]
    if function.takes_submods:
        starred = [i for i, p in enumerate(function.parameters) if p.prefix == "**"]
        at = starred[0] if starred else len(parameters)
        has_star = any(p.prefix == "*" for p in function.parameters)
        parameters[at:at] = ["__vllm_submods__"] if has_star else ["*", "__vllm_submods__"]
    known = all(parameter.default is None for parameter in function.parameters)
    return (
        environment()
        .get_template("function.py.jinja")
        .render(
            signature=signature_text(function.name, parameters, known=known),
            note=_comment(function.note),
            statements=list(_lines_of(function.body, texts)),
        )
    )


def with_depth(body: Sequence[ir.Stmt]) -> Iterator[tuple[ir.Stmt, int]]:
    """Each statement, and the number of blocks around it: ``try:`` stands where its region was entered, the call of its ``finally:`` inside."""
    depth = 0
    for stmt in body:
        yield stmt, depth
        depth += isinstance(stmt, ir.Try) - isinstance(stmt, ir.Finally)


def _lines_of(body: Sequence[ir.Stmt], texts: Sequence[str]) -> Iterator[dict[str, str]]:
    """The comment and the code of each statement, indented by the blocks around it."""
    before: ir.Stmt | None = None
    for (stmt, depth), text in zip(with_depth(body), texts, strict=True):
        pad = " " * (4 * depth)
        comment = comment_text(stmt)
        code = pad + text.replace("\n", f"\n{pad}")
        if isinstance(stmt, ir.Finally):
            empty = f"{pad}pass\n" if isinstance(before, ir.Try) else ""
            code = f"{empty}{pad[4:]}finally:\n{code}"
        yield {"comment": f"{pad}# {comment}" if comment else "", "code": code}
        before = stmt


def _parameter(parameter: ir.Parameter) -> str:
    default = "" if parameter.default is None else f"={expr_text(parameter.default)}"
    return f"{parameter.prefix}{parameter.name}{default}"


def _alias(alias: ir.Alias) -> str:
    text = f"{alias.name} = {expr_text(alias.value)}"
    return text if len(text) <= LINE_LENGTH else format_source(f"{text}\n").removesuffix("\n")


def _const_row(spec: ir.ConstSpec) -> str:
    origin = f" from {spec.attribute}" if spec.attribute else ""
    return _comment(f"[{spec.index}] {spec.description}{origin}")


def _comment(text: str) -> str:
    """``text`` on one line, in ASCII, so that it cannot end its comment nor be a directive."""
    line = text if text.isascii() and text.isprintable() else ascii(text)[1:-1]
    return _DIRECTIVE.sub(r"\1 -", line).rstrip()


def comment_text(stmt: ir.Stmt) -> str:
    """``layers.0.self_attn  modeling.py:41  -> f32[1, s0, 64]``, as far as known."""
    if isinstance(stmt, (ir.Delete, ir.Return, ir.Try, ir.Finally)):
        return ""
    origin = stmt.origin
    shapes = f"-> {origin.shapes}" if origin.shapes else ""
    if not origin.module and not origin.source:
        return ""
    text = "  ".join(part for part in (origin.module, origin.source, shapes) if part)
    return _DIRECTIVE.sub(r"\1 -", text).rstrip()


# --- lines -----------------------------------------------------------------------------------------


def line_map(module: ir.Module, tree: ast.Module) -> dict[int, ir.Origin]:
    """Map each line that a statement covers to that statement's origin; ``tree`` is the parsed source."""
    lines: dict[int, ir.Origin] = {}
    functions = [*module.functions, module.entry]
    defined = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    for function, node in zip(functions, defined, strict=True):
        said = [stmt for stmt in function.body if not isinstance(stmt, ir.Try)]
        for stmt, written in zip(said, flat_statements(node.body), strict=True):
            if isinstance(stmt, (ir.Delete, ir.Try)):
                continue
            origin = stmt.call.origin if isinstance(stmt, ir.Finally) else stmt.origin
            for line in range(written.lineno, (written.end_lineno or written.lineno) + 1):
                lines[line] = origin
    return lines


def flat_statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of ``body`` and of the blocks in it, in order."""
    for stmt in body:
        if isinstance(stmt, ast.Try):
            yield from flat_statements(
                [each for each in stmt.body if not isinstance(each, ast.Pass)]
            )
            yield from stmt.finalbody
        else:
            yield stmt
