"""Runs pieces and operators inside named profiler ranges, for the length of a block.

The emitted source is not changed. Captures get a copy of it that tells which statement runs.
"""

import ast
import linecache
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import FrameType, FunctionType

import torch

from piecework.codegen.plan import ir
from piecework.codegen.stitch.bind import filename_of

Piece = Callable[..., object]
Layer = Callable[[FrameType], str]
Span = Callable[[int, str], AbstractContextManager[object]]
SPAN = "__piecework_span__"


@contextmanager
def named_pieces(
    function: FunctionType,
    submod_lists: Sequence[list[Piece]],
    labels: Sequence[str],
    operators: Mapping[str, str],
    layer: Layer | None = None,
) -> Iterator[None]:
    """Wrap every piece (by ``labels``) and operator in a profiler range for the block."""
    kept = [list(submods) for submods in submod_lists]
    defaults = function.__kwdefaults__ or {}
    default = defaults["__vllm_submods__"]
    try:
        defaults["__vllm_submods__"] = type(default)(map(_named, default, labels))
        for submods, before in zip(submod_lists, kept, strict=True):
            submods[:] = map(_named, before, labels)
        with named_globals(function.__globals__, operators, layer):
            yield
    finally:
        for submods, before in zip(submod_lists, kept, strict=True):
            submods[:] = before
        defaults["__vllm_submods__"] = default


@contextmanager
def named_globals(
    namespace: dict[str, object], labels: Mapping[str, str], layer: Layer | None = None
) -> Iterator[None]:
    """Wrap what an emitted module calls, by name, in a range of that label for the block."""
    kept = {name: namespace[name] for name in labels}
    for name, label in labels.items():
        namespace[name] = _named(kept[name], label, layer)  # type: ignore[arg-type]
    try:
        yield
    finally:
        namespace.update(kept)


def layer_by_line(code: str, lines: Mapping[int, ir.Origin]) -> Layer:
    """Tells the layer that a call stands for by the emitted line that runs; "" if not known."""
    filename = filename_of(code)

    def layer(frame: FrameType) -> str:
        found = ""
        caller: FrameType | None = frame
        # The outermost line is the layer's own; a function inside may serve several.
        while caller is not None and caller.f_code.co_filename == filename:
            origin = lines.get(caller.f_lineno)
            found = found if origin is None else origin.module
            caller = caller.f_back
        return found

    return layer


def by_statement(function: FunctionType, span: Span) -> FunctionType:
    """A copy of an emitted function, each statement of which runs in ``span(line, callee)``."""
    filename = function.__code__.co_filename
    tree = ast.parse("".join(linecache.getlines(filename)))
    for each in tree.body:
        if isinstance(each, ast.FunctionDef):
            each.body = _inside_spans(each.body)
    ast.fix_missing_locations(tree)
    scope = {**function.__globals__, SPAN: span}
    exec(compile(tree, filename, "exec", dont_inherit=True), scope)
    made: FunctionType = scope[function.__name__]
    made.__kwdefaults__ = function.__kwdefaults__
    return made


def _inside_spans(body: list[ast.stmt]) -> list[ast.stmt]:
    found: list[ast.stmt] = []
    for each in body:
        if isinstance(each, ast.Try):
            each.body, each.finalbody = _inside_spans(each.body), _inside_spans(each.finalbody)
        elif isinstance(each, (ast.Assign, ast.Expr, ast.Return)):
            called = ast.unparse(each.value.func) if isinstance(each.value, ast.Call) else ""
            told: list[ast.expr] = [ast.Constant(each.lineno), ast.Constant(called)]
            items = [ast.withitem(ast.Call(ast.Name(SPAN, ast.Load()), told, []))]
            each = ast.copy_location(ast.With(items, [each]), each)
        found.append(each)
    return found


def _named(function: Piece, label: str, layer: Layer | None = None) -> Piece:
    def run(*args: object, **kwargs: object) -> object:
        where = "" if layer is None else layer(sys._getframe(1))
        with torch.profiler.record_function(f"{label} {where}".strip()):
            return function(*args, **kwargs)

    return run
