"""Stitching source that a person edited: its signature checked, its meaning proved or denied."""

import ast
from dataclasses import dataclass, field

import torch.fx

from piecework.codegen.graph.targets import ENTRY_NAME
from piecework.codegen.plan.ir import Proof
from piecework.codegen.plan.render import numbered
from piecework.codegen.stitch.source import StitchedSource, verify
from piecework.errors import EmitError


@dataclass(frozen=True, slots=True)
class EditedSource:
    """An edited text that keeps the contract."""

    code: str = field(repr=False)  # the text
    proof: Proof | None  # what was proved against the graph; None if it means something else now
    difference: str | None  # the first difference from the graph, when there is no proof


def check_edited(source: StitchedSource, split_gm: torch.fx.GraphModule, code: str) -> EditedSource:
    """Check an edited version of the source that was generated for a graph."""
    try:
        tree = ast.parse(code)
        compile(tree, "<edited>", "exec", dont_inherit=True)
    except (TypeError, SyntaxError, ValueError, RecursionError, MemoryError) as error:
        text = numbered(code) if isinstance(code, str) else repr(code)
        raise EmitError(f"the edited source is not Python: {error}\n{text}") from error
    before, after = _signature(ast.parse(source.code)), _signature(tree)
    if before != after:
        raise EmitError(
            f"the edited {ENTRY_NAME} takes ({after}); its callers pass ({before})",
            hint="edit all of stitched.source.code, and keep the function's name and signature",
        )
    try:
        return EditedSource(code, verify(source, split_gm, edited=code), None)
    except EmitError as error:
        return EditedSource(code, None, str(error))


def _signature(tree: ast.Module) -> str | None:
    found = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == ENTRY_NAME]
    return ast.unparse(found[-1].args) if found else None
