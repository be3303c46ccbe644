"""Stitching source that a person edited. In: the generated source, its graph and the edited text. Out: an `EditedSource` that may run in its place.

The text must keep the contract (signature, names, indices); whether it still means the graph is proved or said, never assumed.
"""

from __future__ import annotations

import ast
import builtins
import types
from collections.abc import Iterator
from dataclasses import dataclass

import torch.fx

from piecework.code_objects import global_names, with_inner_code
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

    code: str
    proof: Proof | None
    difference: str | None


def check_edited(source: StitchedSource, split_gm: torch.fx.GraphModule, code: str) -> EditedSource:
    """Check an edited version of ``source``.

    Args:
        source: what was generated.
        split_gm: its graph.
        code: the edited text.

    Raises:
        EmitError: the text is not Python, defines no ``execution_fn`` with the generated signature, reads a name that
            nothing defines, or an index outside ``__vllm_submods__`` or ``__vllm_consts__``.
    """
    if not isinstance(code, str):
        raise EmitError(
            f"the edited source must be text; got a {type(code).__qualname__}",
            hint="pass the text, such as stitched.source.code with a change",
        )
    try:
        tree = parse_text(code, "the edited source")
        compiled = compile(tree, "<edited>", "exec", dont_inherit=True)
        _check_signature(tree, source)
        _check_names(compiled, tree, source)
        _check_indices(tree, source)
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


def _check_names(compiled: types.CodeType, tree: ast.Module, source: StitchedSource) -> None:
    defined = set(dir(builtins)) | {"__vllm_consts__"}
    defined |= {row.name for row in source.module.bound}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            defined |= {(a.asname or a.name).partition(".")[0] for a in node.names}
    defined |= set(_stored_globals(tree))
    code = with_inner_code([compiled])
    for name in sorted(set().union(*map(global_names, code))):
        if name not in defined:
            raise EmitError(
                f"the edited source reads the name {name!a}, which nothing defines",
                hint="import or define it in the text",
            )


def _stored_globals(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            for each in ast.walk(node):
                if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store):
                    yield each.id


def _check_indices(tree: ast.Module, source: StitchedSource) -> None:
    sizes = {"__vllm_submods__": len(source.submod_names), "__vllm_consts__": len(source.consts)}
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Subscript)
            and isinstance(node.value, ast.Name)
            and node.value.id in sizes
        ):
            index, size = node.slice, sizes[node.value.id]
            if not (
                isinstance(index, ast.Constant)
                and type(index.value) is int
                and 0 <= index.value < size
            ):
                raise EmitError(
                    f"line {node.lineno}: {ast.unparse(node)} is not one of the {size} entries",
                    hint=f"indices go from 0 to {size - 1}",
                )
