"""Proves that emitted text does what its graph does, by running both on tokens and comparing what they call."""

from __future__ import annotations

import ast
from dataclasses import dataclass

import torch.fx

from piecework.codegen.graph.targets import ENTRY_NAME
from piecework.codegen.proof.graph_run import Linkage, run_graph
from piecework.codegen.proof.text_run import TextRun, parse_text


@dataclass(frozen=True, slots=True)
class Proof:
    """What was proved equal: the number of events (calls), and of the statements that were run on tokens to get them."""

    events: int
    statements: int


def prove(
    code: str,
    split_gm: torch.fx.GraphModule,
    linked: Linkage,
    *,
    lifetimes: bool = True,
    tree: ast.Module | None = None,
) -> Proof:
    """Prove that ``code`` computes what ``split_gm`` computes, in the same order.

    Args:
        code: an emitted module, edited or not.
        split_gm: the stitching graph.
        linked: what the text's names stand for.
        lifetimes: also require that each value is deleted right after its last use.
        tree: ``code``, parsed.

    Raises:
        EmitError: the first difference, with the line of the text and the node of the graph.
    """
    graph = run_graph(split_gm, linked)
    run = TextRun(code, parse_text(code) if tree is None else tree, ENTRY_NAME, graph, linked)
    run.check_signature(node for node, _ in graph.parameters)
    held = {
        name: graph.weights[path] for name, path in linked.bound.items() if path in graph.weights
    }
    run.finish(run.run(held, [token for _, token in graph.parameters]))
    if lifetimes:
        run.check_lifetimes()
    return Proof(len(graph.events), run.statements)
