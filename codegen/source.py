"""The emitted source as a value. In: a stitching graph. Out: a `StitchedSource` with its code, submodule names, constants and line map.

Emission is deterministic: the same graph gives the same bytes in every process. Nothing is executed or written to disk.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass

import torch.fx
from piecework.codegen import ir
from piecework.codegen.lower import LowerOptions, lower
from piecework.codegen.render import line_map, render


@dataclass(frozen=True, slots=True)
class StitchedSource:
    """Emitted stitching source.

    Attributes:
        code: the Python text, exactly what is executed.
        submod_names: what ``__vllm_submods__[i]`` must be, by name.
        consts: the values of ``__vllm_consts__``.
        lines: line number → origin of the statement on it.
        module: the plan that the text was rendered from.
    """

    code: str
    submod_names: tuple[str, ...]
    consts: tuple[object, ...]
    lines: dict[int, ir.Origin]
    module: ir.Module

    def __str__(self) -> str:
        return self.code


def generate_source(
    split_gm: torch.fx.GraphModule, options: LowerOptions | None = None
) -> StitchedSource:
    """Lower and render ``split_gm``.

    Raises:
        UnsupportedNode: a node has no source form.
        EmitError: the text did not prove equal to the graph.
    """
    module, consts = lower(split_gm, options)
    code = render(module)
    return StitchedSource(
        code=code,
        submod_names=module.submod_names,
        consts=tuple(consts),
        lines=line_map(module, ast.parse(code)),
        module=module,
    )


def generate_execution_code(
    split_gm: torch.fx.GraphModule,
) -> tuple[str, list[str], list[object]]:
    """Emit ``execution_fn`` for a stitching graph.

    Submodules that are plain ``GraphModule``s are inlined; every other submodule is called through ``__vllm_submods__``.

    Returns:
        ``(code, submod_names, consts)``: the source, the name of each entry of ``__vllm_submods__``, and the values of
        ``__vllm_consts__``.

    Raises:
        UnsupportedNode: a node has no source form; the message names it and its source line.

    Example:
        >>> code, submod_names, consts = generate_execution_code(split_gm)
        >>> fn = compile_execution_fn(code, {name: getattr(split_gm, name) for name in submod_names}, submod_names, consts)
    """
    source = generate_source(split_gm)
    return source.code, list(source.submod_names), list(source.consts)
