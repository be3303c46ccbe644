"""From text to function: emitted source is executed as it is, where tracebacks can show it."""

import hashlib
import linecache
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import FunctionType

from piecework.codegen.graph.targets import ENTRY_NAME
from piecework.codegen.plan.render import numbered
from piecework.errors import BindError, EmitError, short_errors


@short_errors
def compile_execution_fn(
    code: str,
    submod_callables: Mapping[str, Callable[..., object]],
    submod_names: Sequence[str],
    consts: Sequence[object] | None = None,
    *,
    bound: Mapping[str, object] | None = None,
) -> Callable[..., object]:
    """Execute ``code`` and return its ``execution_fn`` with submodules bound.

    ``__vllm_submods__`` becomes a keyword default; pass another list (of a batch range) explicitly.

    Args:
        code: what `generate_execution_code` returned, or an edited version of it.
        submod_callables: submodule name → callable.
        submod_names: order of ``__vllm_submods__``.
        consts: values of ``__vllm_consts__``.
        bound: module-level names to hold ready (weights).

    Raises:
        BindError: a submodule has no callable, or one is not callable.
        EmitError: the code is not Python or defines no ``execution_fn``.
    """
    if not isinstance(code, str):
        raise EmitError(
            f"stitching source must be text; got a {type(code).__qualname__}",
            hint="pass what generate_execution_code returned",
        )
    for name in submod_names:
        if not callable(submod_callables.get(name)):
            raise BindError(
                f"submodule {name!a} has no callable, or is bound to something that can't be called",
                hint="pass one callable for each name in submod_names",
            )
    submods = [submod_callables[name] for name in submod_names]
    function = execute_source(code, {"__vllm_consts__": list(consts or ()), **(bound or {})})
    function.__kwdefaults__ = {**(function.__kwdefaults__ or {}), "__vllm_submods__": submods}
    return function


def filename_of(code: str) -> str:
    """What tracebacks call emitted source, by its content."""
    return f"<piecework:{hashlib.sha256(code.encode()).hexdigest()[:16]}>"


def execute_source(
    code: str, namespace: Mapping[str, object], name: str = ENTRY_NAME
) -> FunctionType:
    """Execute ``code`` in a fresh module namespace and return its function ``name``."""
    filename = filename_of(code)
    try:
        compiled = compile(code, filename, "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise EmitError(f"stitching source does not compile: {error}\n{numbered(code)}") from error
    scope: dict[str, object] = {"__name__": "piecework_stitched", **namespace}
    try:
        exec(compiled, scope)
    except ImportError as error:
        raise BindError(
            f"stitching source imports a module that is not here: {error}",
            hint="install or import what the traced model called, by the same name",
        ) from error
    except Exception as error:  # only an edited text, whose module level may do anything
        why = f"{type(error).__name__}: {error}"
        raise EmitError(f"stitching source fails where it is defined: {why}") from error
    function = scope.get(name)
    if not isinstance(function, FunctionType):
        raise EmitError(
            f"stitching source defines no function {name}",
            hint="keep the function's name; generate_execution_code writes it",
        )
    _show_in_tracebacks(filename, code, function)
    return function


class _Lines(list[str]):
    """Lines in linecache, and the functions that were made from them."""

    def __init__(self, lines: Iterable[str]) -> None:
        super().__init__(lines)
        self.functions: weakref.WeakSet[FunctionType] = weakref.WeakSet()


def _show_in_tracebacks(filename: str, code: str, function: FunctionType) -> None:
    """Register ``code`` with linecache for as long as a function made from it lives."""
    lines = _known_lines(filename)
    if lines is None:
        lines = _Lines(code.splitlines(keepends=True))
        linecache.cache[filename] = (len(code), None, lines, filename)
    lines.functions.add(function)
    weakref.finalize(function, _forget, filename, lines)


def _known_lines(filename: str) -> _Lines | None:
    entry = linecache.cache.get(filename)
    found = entry[2] if entry is not None and len(entry) == 4 else None
    return found if isinstance(found, _Lines) else None


def _forget(filename: str, lines: _Lines) -> None:
    # A dying function may still count in len(); iterating skips it.
    if not any(True for _ in lines.functions) and _known_lines(filename) is lines:
        del linecache.cache[filename]
