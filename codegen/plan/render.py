"""From plan to text: an `ir.Module` becomes Python source in black's format.

Black is slow, and statements repeat with other numbers in their names: it is shown each form once,
with all digits zero, and the digits are put back.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

from piecework.codegen.plan import ir
from piecework.codegen.plan.names import SUBMODS
from piecework.errors import EmitError

if TYPE_CHECKING:
    import jinja2

FORMAT_VERSION = 1
LINE_LENGTH = 100

_DIGITS = re.compile("[0-9]+")
_ZEROS = str.maketrans("123456789", "000000000")

_KEPT = 10_000  # forms

#: A statement on one line, and how many blocks of its function's body are around it.
Statement = tuple[str, int]
_UNCOMMENTED = ("del", "return", "try", "finally")

# What switches black off, or tells it or a type checker something, when it is all of a comment.
_DIRECTIVE = re.compile(r"\b(fmt|yapf|type|noqa|pragma|pylint|isort)\s*:")


def filled(template: str, **fields: object) -> str:
    """A template of piecework's with its fields filled in."""
    return str(_environment().get_template(template).render(fields))


@cache
def _environment() -> jinja2.Environment:
    """The one Jinja environment; it escapes HTML alone."""
    import jinja2

    return jinja2.Environment(
        loader=jinja2.PackageLoader("piecework", "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=jinja2.select_autoescape(["html.jinja"], default=False),
    )


def render(
    module: ir.Module, title: str, header: Sequence[str] = (), facts: Sequence[str] = ()
) -> str:
    """Write ``module`` as Python source."""
    every = (*module.functions, module.entry)
    statements = [each for function in every for each in _with_depth(function.body)]
    forms = [(stmt.text, depth) for stmt, depth in statements if stmt.kind != "try"]
    texts = iter(format_statements(forms))
    aliases = [{"code": _alias(each), "note": _comment(each.note)} for each in module.aliases]
    return filled(
        "module.py.jinja",
        title=title,
        format_version=FORMAT_VERSION,
        header=[f"# {_comment(line)}".rstrip() for line in header],
        imports=module.imports,
        aliases=aliases,
        facts=facts,
        functions=[_function(function, texts) for function in every],
        bound=[_comment(f"{row.name}: {row.description} = {row.path}") for row in module.bound],
    )


def table_rows(title: str, rows: Sequence[str]) -> list[str]:
    """Lines of a header: an empty one, the title, and the rows; none of all that without rows."""
    return ["", f"{title}:", *(f"  {row}" for row in rows)] if rows else []


def const_rows(module: ir.Module) -> list[str]:
    rows = (
        f"[{spec.index}] {spec.description}" + (f" from {spec.attribute}" if spec.attribute else "")
        for spec in module.const_specs
    )
    return table_rows("__vllm_consts__", list(rows))


def _function(function: ir.Function, texts: Iterator[str]) -> str:
    signature = format_source(f"{_signature(function)}\n    pass\n")
    return filled(
        "function.py.jinja",
        signature=signature.removesuffix("\n    pass\n"),
        note=_wrapped(_comment(function.note)),
        statements=list(_lines_of(function.body, texts)),
    )


def _signature(function: ir.Function) -> str:
    """``def name(parameters):``; what takes ``__vllm_submods__`` takes it by keyword."""
    parameters = list(function.parameters)
    if function.takes_submods:
        ends = len(parameters) - (bool(parameters) and parameters[-1].kind == "**")
        parameters.insert(ends, ir.Parameter(SUBMODS, "k"))
    kinds = [each.kind for each in parameters]
    parts: list[str] = []
    for number, each in enumerate(parameters):
        if each.kind == "k" and not {"*", "k"} & {*kinds[:number]}:
            parts.append("*")
        stars = each.kind if each.kind in ("*", "**") else ""
        default = "" if each.default is None else f"={each.default}"
        parts.append(f"{stars}{each.name}{default}")
        if each.kind == "/" and kinds[number + 1 : number + 2] != ["/"]:
            parts.append("/")
    return f"def {function.name}({', '.join(parts)}):"


def _wrapped(note: str) -> str:
    """A note below a signature, on as many lines as it takes; the template has the first ``#``."""
    if len(note) <= LINE_LENGTH - 6:
        return note
    whole = note.replace(" = ", "\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}")  # an item is not cut
    lines = textwrap.wrap(whole, LINE_LENGTH - 8, break_long_words=False)
    return "\n    #   ".join(lines).replace("\N{NO-BREAK SPACE}", " ")


def _with_depth(body: Sequence[ir.Statement]) -> Iterator[tuple[ir.Statement, int]]:
    """Each statement, and the number of blocks around it."""
    depth = 0
    for stmt in body:
        yield stmt, depth
        depth += (stmt.kind == "try") - (stmt.kind == "finally")


def _lines_of(body: Sequence[ir.Statement], texts: Iterator[str]) -> Iterator[dict[str, str]]:
    """The comment and the code of each statement, indented by the blocks around it."""
    before = ""
    for stmt, depth in _with_depth(body):
        text = "try:" if stmt.kind == "try" else next(texts)
        pad = " " * (4 * depth)
        comment = f"\n{pad}    ".join(f"# {each}" for each in _comment_lines(stmt, 4 + len(pad)))
        code = pad + text.replace("\n", f"\n{pad}")
        if stmt.kind == "finally":
            empty = f"{pad}pass\n" if before == "try" else ""
            code = f"{empty}{pad[4:]}finally:\n{code}"
        yield {"comment": f"{pad}{comment}" if comment else "", "code": code}
        before = stmt.kind


def _alias(alias: ir.Alias) -> str:
    text = f"{alias.name} = {alias.value}"
    return text if len(text) <= LINE_LENGTH else format_source(f"{text}\n").removesuffix("\n")


def _comment(text: str, *, made_here: bool = False) -> str:
    """``text`` on one line, so that it cannot end its comment nor be a directive."""
    line = text if text.isprintable() and (made_here or text.isascii()) else ascii(text)[1:-1]
    return _DIRECTIVE.sub(r"\1 -", line).rstrip()


def _comment_text(stmt: ir.Statement) -> str:
    """``layers.0.self_attn  modeling.py:41  -> f32[1, s0, 64]``, as far as known."""
    origin = stmt.origin
    if stmt.kind in _UNCOMMENTED or not (origin.module or origin.source):
        return ""
    shapes = f"-> {origin.shapes}" if origin.shapes else ""
    code = origin.code if origin.source else ""
    text = "  ".join(part for part in (origin.module, origin.source, code, shapes) if part)
    return _comment(text, made_here=True)


def _comment_lines(stmt: ir.Statement, indent: int) -> list[str]:
    """`_comment_text` in lines that fit: without the user's code, and with shapes below it."""
    text, width = _comment_text(stmt), LINE_LENGTH - indent - len("# ")
    if len(text) <= width:
        return [text] if text else []
    origin = stmt.origin
    if origin.code:
        return _comment_lines(replace(stmt, origin=replace(origin, code="")), indent)
    lines = [_comment_text(replace(stmt, origin=replace(origin, shapes="")))]
    for shape in re.split(r", (?![^\[]*\])", origin.shapes) if origin.shapes else ():
        grown = f"{lines[-1]}, {shape}"
        if len(lines) == 1 or len(grown) >= width:  # a comma may follow
            lines[-1] += "," if len(lines) > 1 else ""
            lines.append(f"  {'->' if len(lines) == 1 else '  '} {shape}")
        else:
            lines[-1] = grown
    return lines


# --- lines -----------------------------------------------------------------------------------------


def line_map(module: ir.Module, tree: ast.Module) -> dict[int, ir.Origin]:
    """Map each line that a statement covers to that statement's origin."""
    lines: dict[int, ir.Origin] = {}
    functions = [*module.functions, module.entry]
    defined = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    for function, node in zip(functions, defined, strict=True):
        statements = [stmt for stmt in function.body if stmt.kind != "try"]
        for stmt, written in zip(statements, _flat(node.body), strict=True):
            if stmt.kind != "del":
                end = (written.end_lineno or written.lineno) + 1
                lines.update(dict.fromkeys(range(written.lineno, end), stmt.origin))
    return lines


def _flat(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of ``body`` and of the blocks in it, in order."""
    for stmt in body:
        if isinstance(stmt, ast.Try):
            yield from _flat([*stmt.body, *stmt.finalbody])
        elif not isinstance(stmt, ast.Pass):
            yield stmt


# --- black ------------------------------------------------------------------------------------------


def numbered(text: str) -> str:
    """``text`` with line numbers, for error messages."""
    lines = text.splitlines()
    width = len(str(len(lines)))
    return "\n".join(f"{number:>{width}} | {line}" for number, line in enumerate(lines, 1))


def format_source(text: str) -> str:
    """``text`` as black formats it; `EmitError` with numbered lines if it is not Python."""
    import black  # here, since those who load what was emitted need none of it
    from black.mode import TargetVersion

    mode = black.Mode(line_length=LINE_LENGTH, target_versions={TargetVersion.PY311})
    try:
        return black.format_str(text, mode=mode)
    except ValueError as error:  # black.InvalidInput; some releases do not export it
        raise EmitError(
            f"emitted source is not Python: {error}\n{numbered(text)}",
            hint="please report this with the graph that was lowered",
        ) from error


def format_statements(statements: Sequence[Statement]) -> list[str]:
    """Each statement as black lays it out in a function's body, without its indentation."""
    forms = [(text.translate(_ZEROS), depth) for text, depth in statements]
    known = _laid_out()
    new = [form for form in dict.fromkeys(forms) if form not in known]
    made = dict(zip(new, _format_each(new), strict=True))
    found = {form: made[form] if form in made else known[form] for form in forms}
    known.update({form: made[form] for form in new[: max(0, _KEPT - len(known))]})
    return [
        _with_digits(found[form], form[0], text)
        for (text, _), form in zip(statements, forms, strict=True)
    ]


@cache
def _laid_out() -> dict[Statement, str]:
    """What black made of forms in this process: it makes the same of them each time."""
    return {}


def _format_each(statements: Sequence[Statement]) -> list[str]:
    """One call of black for all."""
    if not statements:
        return []
    text = "def function():\n"
    for statement, depth in statements:
        text += "".join(f"{' ' * (4 * level)}if block:\n" for level in range(1, depth + 1))
        text += textwrap.indent(f"{statement}\n", " " * (4 * depth + 4))
    text = format_source(text)
    lines = text.splitlines()
    found: list[str] = []
    function: Any = ast.parse(text).body[0]
    for (_, depth), block in zip(statements, function.body, strict=True):
        for _ in range(depth):
            block = block.body[0]
        at = slice(block.lineno - 1, block.end_lineno)
        found.append("\n".join(line[4 * depth + 4 :] for line in lines[at]))
    return found


def _with_digits(formatted: str, form: str, text: str) -> str:
    """``formatted``, which is ``form`` laid out, with the digits of ``text``."""
    if formatted == form:
        return text
    digits = iter(_DIGITS.findall(text))
    return _DIGITS.sub(lambda _: next(digits), formatted)
