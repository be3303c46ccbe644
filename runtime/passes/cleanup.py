"""Leave a graph as the next step expects it. In: a graph after other passes. Out: every node after what it reads, and no dead ones.

The order of nodes that are in order already is kept, and so are all writes.
"""

from __future__ import annotations

import torch.fx

from piecework.errors import PieceCompileError
from piecework.runtime.passes.interface import InductorPass


class CleanUpPass(InductorPass):
    """Sorts the graph, removes nodes without a user, and checks it; the count is of nodes moved and removed."""

    def __call__(self, graph: torch.fx.Graph) -> int:
        moved = sort_nodes(graph)
        before = len(graph.nodes)
        graph.eliminate_dead_code()
        graph.lint()
        return moved + before - len(graph.nodes)


def sort_nodes(graph: torch.fx.Graph) -> int:
    """Move each node that stands before one of its inputs to right after the last of them; returns how many moved.

    Raises:
        PieceCompileError: nodes need each other's values.
    """
    done: set[torch.fx.Node] = set()
    waiting: dict[torch.fx.Node, list[torch.fx.Node]] = {}
    last: torch.fx.Node | None = None
    moved = 0
    pending = list(reversed(graph.nodes))
    while pending:
        node = pending.pop()
        missing = next((each for each in node.all_input_nodes if each not in done), None)
        if missing is not None:
            waiting.setdefault(missing, []).append(node)
            continue
        if last is not None and last.next is not node:
            last.append(node)
            moved += 1
        done.add(node)
        last = node
        pending.extend(reversed(waiting.pop(node, [])))
    if waiting:
        stuck = ", ".join(f"%{each.name}" for nodes in waiting.values() for each in nodes)
        raise PieceCompileError(f"after the passes, nodes need each other's values: {stuck}")
    return moved
