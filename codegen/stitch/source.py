"""The emitted source as a value; what emits and proves it is imported where that is done."""

import ast
from dataclasses import dataclass, field

import torch.fx

from piecework.codegen.plan import ir
from piecework.codegen.plan.ir import LowerOptions, Proof
from piecework.codegen.plan.render import const_rows, line_map, render, table_rows
from piecework.collector import collector_paused
from piecework.errors import EmitError, short_errors


@dataclass(frozen=True, slots=True)
class StitchedSource:
    """Emitted stitching source.

    Attributes:
        code: the Python text, exactly what is executed.
        submod_names: what ``__vllm_submods__[i]`` must be, by name.
        consts: the values of ``__vllm_consts__``.
        lines: line number → origin of the statement on it.
        module: the plan that the text was rendered from.
        options: what it was lowered with.
        proof: what was proved of it against its graph.
    """

    code: str
    submod_names: tuple[str, ...]
    consts: tuple[object, ...]
    lines: dict[int, ir.Origin]
    module: ir.Module
    options: LowerOptions = field(default_factory=LowerOptions, repr=False, compare=False)
    proof: Proof | None = None

    def __str__(self) -> str:
        return self.code


@short_errors
def generate_source(
    split_gm: torch.fx.GraphModule, options: LowerOptions | None = None
) -> StitchedSource:
    """Lower and render ``split_gm``.

    Raises:
        UnsupportedNode: a node has no source form.
        EmitError: the text did not prove equal to the graph, or ``split_gm`` is no graph.
    """
    from piecework.codegen.proof.prove import linkage_of, prove
    from piecework.codegen.stitch.lower import lower

    _require_graph(split_gm)
    options = options or LowerOptions()
    with collector_paused():
        module, consts = lower(split_gm, options)
        code = stitched_text(module)
        tree = ast.parse(code)
        lines = line_map(module, tree)
        proof = prove(code, split_gm, linkage_of(module, options, consts), tree)
        del tree  # which the proof has made its own: the collector shall not look at it
    names = module.submod_names
    return StitchedSource(code, names, tuple(consts), lines, module, options, proof)


def _require_graph(split_gm: object) -> None:
    if not isinstance(split_gm, torch.fx.GraphModule):
        raise EmitError(
            f"split_gm must be a torch.fx.GraphModule; got a {type(split_gm).__qualname__}",
            hint="pass the first of the two values that split_graph returns",
        )


def stitched_text(module: ir.Module) -> str:
    rows = enumerate(zip(module.submod_names, module.digests, strict=True))
    submods = [f"[{index}] {name}  {digest}".rstrip() for index, (name, digest) in rows]
    banner = ["", *module.banner] if module.banner else []
    header = [*banner, *table_rows("__vllm_submods__", submods), *const_rows(module)]
    return render(module, "stitching source", header)


@short_errors
def verify(
    source: StitchedSource, split_gm: torch.fx.GraphModule, *, edited: str | None = None
) -> Proof:
    """Prove that emitted source does what ``split_gm`` does (translation validation).

    Args:
        source: what `generate_source` returned.
        split_gm: the stitching graph.
        edited: a text to check in place of the one in ``source`` (an edited file).

    Returns:
        How much was proved.

    Raises:
        EmitError: the first difference, with the line of the text and the node of the graph.

    Example:
        >>> verify(source, split_gm)
        Proof(events=33, statements=98)
    """
    from piecework.codegen.proof.prove import linkage_of, prove

    _require_graph(split_gm)
    if not isinstance(source, StitchedSource):
        raise EmitError(
            f"source must be a StitchedSource; got a {type(source).__qualname__}",
            hint="pass stitched.source",
        )
    linked = linkage_of(source.module, source.options, source.consts)
    return prove(source.code if edited is None else edited, split_gm, linked)


@short_errors
def generate_execution_code(split_gm: torch.fx.GraphModule) -> tuple[str, list[str], list[object]]:
    """Emit ``execution_fn`` for a stitching graph.

    Submodules that are plain ``GraphModule``s are inlined; every other submodule is called through
    ``__vllm_submods__``.

    Returns:
        ``(code, submod_names, consts)``: the source, and what ``__vllm_submods__`` and
        ``__vllm_consts__`` hold, by name and by value.

    Raises:
        UnsupportedNode: a node has no source form; the message names it and its source line.
        EmitError: ``split_gm`` is no graph.

    Example:
        >>> code, submod_names, consts = generate_execution_code(split_gm)
        >>> submods = {name: getattr(split_gm, name) for name in submod_names}
        >>> fn = compile_execution_fn(code, submods, submod_names, consts)
    """
    source = generate_source(split_gm)
    return source.code, list(source.submod_names), list(source.consts)
