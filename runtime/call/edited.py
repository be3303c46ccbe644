"""Stitching source that a person edited: its signature is checked, and its meaning proved or denied."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field

import torch.fx

from piecework.codegen import StitchedSource
from piecework.codegen.plan.formatting import numbered
from piecework.codegen.proof.prove import Proof
from piecework.codegen.proof.recording import parse_text
from piecework.codegen.stitch.lower import ENTRY_NAME
from piecework.codegen.stitch.source import verify
from piecework.errors import EmitError


@dataclass(frozen=True, slots=True)
class EditedSource:
    """An edited text that keeps the contract.

    Attributes:
        code: the text.
        proof: what was proved against the graph; None if it means something else now.
        difference: the first difference from the graph, when there is no proof.
    """

    code: str = field(repr=False)
    proof: Proof | None
    difference: str | None


def check_edited(source: StitchedSource, split_gm: torch.fx.GraphModule, code: str) -> EditedSource:
    """Check an edited version of ``source``.

    Args:
        source: what was generated.
        split_gm: its graph.
        code: the edited text.

    Raises:
        EmitError: the text is not Python, or has no ``execution_fn`` with the generated signature.
    """
    if not isinstance(code, str):
        raise EmitError(
            f"the edited source must be text; got a {type(code).__qualname__}",
            hint="pass the text, such as stitched.source.code with a change",
        )
    try:
        tree = parse_text(code, "the edited source")
        compile(tree, "<edited>", "exec", dont_inherit=True)
        _check_signature(tree, source)
    except (SyntaxError, ValueError) as error:
        raise EmitError(f"the edited source is not Python: {error}\n{numbered(code)}") from error
    except (RecursionError, MemoryError) as error:
        raise EmitError("the edited source is nested too deeply for Python to compile") from error
    try:
        return EditedSource(code, verify(source, split_gm, edited=code), None)
    except EmitError as error:
        return EditedSource(code, None, str(error))


def _entry_of(tree: ast.Module) -> ast.FunctionDef:
    found = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == ENTRY_NAME]
    if not found:
        raise EmitError(
            f"the edited source defines no function {ENTRY_NAME}",
            hint="edit all of stitched.source.code, and keep the function's name",
        )
    return found[-1]


def _check_signature(tree: ast.Module, source: StitchedSource) -> None:
    generated, edited = _entry_of(ast.parse(source.code)), _entry_of(tree)
    before, after = ast.unparse(generated.args), ast.unparse(edited.args)
    if before != after:
        raise EmitError(
            f"the edited {ENTRY_NAME} takes ({after}); its callers pass ({before})",
            hint="keep the signature as it was generated",
        )
