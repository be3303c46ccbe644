"""From plan to text. In: an `ir.Module`. Out: the Python source, formatted by black, and the statement that each line belongs to.

Expressions become text here; layout belongs to the templates; nothing is decided that the plan did not say.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from functools import cache
from typing import assert_never

import black
import jinja2
from piecework.codegen import ir
from piecework.codegen.names import is_identifier
from piecework.errors import EmitError

FORMAT_VERSION = 1
LINE_LENGTH = 100


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
        EmitError: black could not parse the text (a defect of piecework; the numbered text is in the message).
    """
    template = environment().get_template("module.py.jinja")
    text = template.render(
        format_version=FORMAT_VERSION,
        banner=module.banner,
        submods=[
            f"[{index}] {ascii(name)[1:-1]}" for index, name in enumerate(module.submod_names)
        ],
        consts=[_const_row(spec) for spec in module.const_specs],
        imports=module.imports,
        aliases=[
            {"name": alias.name, "value": expr_text(alias.value), "note": _comment(alias.note)}
            for alias in module.aliases
        ],
        functions=[render_function(function) for function in module.functions],
        entry=render_function(module.entry),
        bound=[f"{row.name}: {row.description} = {_comment(row.path)}" for row in module.bound],
    )
    return format_source(text)


def format_source(text: str) -> str:
    """Format ``text`` with black; raise `EmitError` with numbered lines if it is not Python."""
    try:
        return black.format_str(text, mode=black.Mode(line_length=LINE_LENGTH))
    except black.InvalidInput as error:
        raise EmitError(
            f"emitted source is not Python: {error}\n{numbered(text)}",
            hint="please report this with the graph that was lowered",
        ) from error


def numbered(text: str) -> str:
    lines = text.splitlines()
    width = len(str(len(lines)))
    return "\n".join(f"{number:>{width}} | {line}" for number, line in enumerate(lines, 1))


def render_function(function: ir.Function) -> str:
    parameters = [_parameter(p) for p in function.parameters]
    if function.takes_submods:
        starred = [i for i, p in enumerate(function.parameters) if p.prefix == "**"]
        at = starred[0] if starred else len(parameters)
        has_star = any(p.prefix == "*" for p in function.parameters)
        parameters[at:at] = ["__vllm_submods__"] if has_star else ["*", "__vllm_submods__"]
    return (
        environment()
        .get_template("function.py.jinja")
        .render(
            name=function.name,
            parameters=", ".join(parameters),
            note=_comment(function.note),
            statements=[
                {"comment": comment_text(stmt), "code": stmt_text(stmt)} for stmt in function.body
            ],
        )
    )


def _parameter(parameter: ir.Parameter) -> str:
    default = "" if parameter.default is None else f"={expr_text(parameter.default)}"
    return f"{parameter.prefix}{parameter.name}{default}"


def _const_row(spec: ir.ConstSpec) -> str:
    origin = f" from {ascii(spec.attribute)[1:-1]}" if spec.attribute else ""
    return f"[{spec.index}] {_comment(spec.description)}{origin}"


def _comment(text: str) -> str:
    """``text`` on one line, in ASCII, so that it cannot end its comment."""
    return ascii(text)[1:-1] if not (text.isascii() and text.isprintable()) else text


# --- statements ----------------------------------------------------------------------------------


def comment_text(stmt: ir.Stmt) -> str:
    """``layers.0.self_attn  modeling.py:41  -> f32[1, s0, 64]``, as far as known."""
    if isinstance(stmt, (ir.Delete, ir.Return)):
        return ""
    origin = stmt.origin
    shapes = f"-> {origin.shapes}" if origin.shapes else ""
    if not origin.module and not origin.source:
        return ""
    return "  ".join(part for part in (origin.module, origin.source, shapes) if part)


def stmt_text(stmt: ir.Stmt) -> str:
    match stmt:
        case ir.CallSubmod():
            call = f"__vllm_submods__[{stmt.index}]({arguments_text(stmt.arguments)})"
            return _assign(stmt.targets, stmt.unpack, call)
        case ir.CallInlined():
            text = arguments_text(stmt.arguments)
            if stmt.passes_submods:
                keyword = "__vllm_submods__=__vllm_submods__"
                text = f"{text}, {keyword}" if text else keyword
            return _assign(stmt.targets, stmt.unpack, f"{stmt.function}({text})")
        case ir.CallFunction():
            call = f"{expr_text(stmt.function)}({arguments_text(stmt.arguments)})"
            return _assign(stmt.targets, stmt.unpack, call)
        case ir.CallMethod():
            return _assign(stmt.targets, stmt.unpack, _method_call(stmt))
        case ir.GetItem():
            index = index_text(stmt.index)
            return _assign_one(stmt.target, f"{operand_text(stmt.value)}[{index}]")
        case ir.GetAttr():
            return _assign_one(stmt.target, f"{operand_text(stmt.value)}.{stmt.attribute}")
        case ir.Infix(left=None):
            return _assign_one(stmt.target, f"{stmt.operator} {operand_text(stmt.right)}")
        case ir.Infix(left=left, right=right):
            text = f"{operand_text(left)} {stmt.operator} {operand_text(right)}"
            return _assign_one(stmt.target, text)
        case ir.Delete(names):
            return f"del {', '.join(names)}"
        case ir.Return(value):
            return f"return {expr_text(value)}"
        case _:
            assert_never(stmt)


def _method_call(stmt: ir.CallMethod) -> str:
    arguments = arguments_text(stmt.arguments)
    if is_identifier(stmt.method):
        return f"{operand_text(stmt.receiver)}.{stmt.method}({arguments})"
    return f"getattr({expr_text(stmt.receiver)}, {stmt.method!a})({arguments})"


def _assign(targets: tuple[str, ...], unpack: bool, value: str) -> str:
    if not targets:
        return value
    left = ", ".join(targets)
    if unpack and len(targets) == 1:
        left = f"({left},)"
    return f"{left} = {value}"


def _assign_one(target: str | None, value: str) -> str:
    return value if target is None else f"{target} = {value}"


def arguments_text(arguments: ir.Arguments) -> str:
    parts = [expr_text(arg) for arg in arguments.args]
    named = [(key, value) for key, value in arguments.kwargs if is_identifier(key)]
    others = [(key, value) for key, value in arguments.kwargs if not is_identifier(key)]
    parts += [f"{key}={expr_text(value)}" for key, value in named]
    if others:
        parts.append(f"**{{{', '.join(f'{key!a}: {expr_text(value)}' for key, value in others)}}}")
    return ", ".join(parts)


# --- expressions ---------------------------------------------------------------------------------


def expr_text(expr: ir.Expr) -> str:
    match expr:
        case ir.Name(id):
            return id
        case ir.Literal(value):
            return literal_text(value)
        case ir.Const(index):
            return f"__vllm_consts__[{index}]"
        case ir.Global(path):
            return path
        case ir.ListExpr(items):
            return f"[{_join(items, expr_text)}]"
        case ir.TupleExpr((only,)):
            return f"({expr_text(only)},)"
        case ir.TupleExpr(items):
            return f"({_join(items, expr_text)})"
        case ir.DictExpr(pairs):
            return f"{{{', '.join(f'{expr_text(k)}: {expr_text(v)}' for k, v in pairs)}}}"
        case ir.SliceExpr(start, stop, step):
            return f"slice({_join((start, stop, step), expr_text)})"
        case ir.Construct(kind, items):
            return f"{expr_text(kind)}({_join(items, expr_text)})"
        case _:
            assert_never(expr)


def literal_text(value: object) -> str:
    """A literal as ASCII source; ``...`` for Ellipsis."""
    return "..." if value is Ellipsis else ascii(value)


def operand_text(expr: ir.Expr) -> str:
    """``expr`` where something binds to it: literals other than strings and names get parentheses."""
    text = expr_text(expr)
    plain = isinstance(expr, (ir.Name, ir.Const, ir.Global, ir.ListExpr, ir.Construct))
    return text if plain or (isinstance(expr, ir.TupleExpr) and expr.items) else f"({text})"


def index_text(expr: ir.Expr) -> str:
    """``expr`` inside ``[]``: slices in slice notation, a tuple without its parentheses."""
    if isinstance(expr, ir.SliceExpr):
        return _slice_text(expr)
    if isinstance(expr, ir.TupleExpr) and len(expr.items) > 1:
        return ", ".join(
            _slice_text(item) if isinstance(item, ir.SliceExpr) else expr_text(item)
            for item in expr.items
        )
    return expr_text(expr)


def _slice_text(expr: ir.SliceExpr) -> str:
    none = ir.Literal(None)
    start = "" if expr.start == none else expr_text(expr.start)
    stop = "" if expr.stop == none else expr_text(expr.stop)
    step = "" if expr.step == none else f":{expr_text(expr.step)}"
    return f"{start}:{stop}{step}"


def _join(items: tuple[ir.Expr, ...], text: Callable[[ir.Expr], str]) -> str:
    return ", ".join(text(item) for item in items)


# --- lines -----------------------------------------------------------------------------------------


def line_map(module: ir.Module, source: str) -> dict[int, ir.Origin]:
    """Map each line of ``source`` that a statement covers to that statement's origin."""
    lines: dict[int, ir.Origin] = {}
    functions = [*module.functions, module.entry]
    defined = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    for function, node in zip(functions, defined, strict=True):
        for stmt, written in zip(function.body, node.body, strict=True):
            if isinstance(stmt, ir.Delete):
                continue
            for line in range(written.lineno, (written.end_lineno or written.lineno) + 1):
                lines[line] = stmt.origin
    return lines
