"""Which nodes of a graph lie in the same memory. In: nodes with fake values. Out: for a node its memory, for a memory its nodes.

The recorded values tell, and so does the graph: where a copy was replaced by what it copied, views of the copy are still recorded
in memory that is no more.
"""

from __future__ import annotations

import torch.fx
from torch._ops import OpOverload

from piecework.runtime.passes.nodes import arguments_of, storages_of


class Memory:
    """Which nodes lie in the same memory, kept true by `add` and `merge` while the graph is changed.

    A node whose value is not recorded counts as lying wherever its inputs do.

    Attributes:
        order: the place of each node in the graph.
    """

    def __init__(self, graph: torch.fx.Graph) -> None:
        self.order: dict[torch.fx.Node, int] = {}
        self._merged: dict[int, int] = {}
        self._of: dict[torch.fx.Node, frozenset[int]] = {}
        self._in: dict[int, list[torch.fx.Node]] = {}
        for place, node in enumerate(graph.nodes):
            self.order[node] = place
            self.add(node)

    def add(self, node: torch.fx.Node) -> None:
        """Take in a node; its inputs must be known."""
        known = storages_of(node)
        if known is None:
            known = frozenset().union(*(self._of[source] for source in node.all_input_nodes))
        self._of[node] = known
        for storage in known:
            self._in.setdefault(self._find(storage), []).append(node)
        for source in _viewed_by(node):
            self.merge(self.of(source), self.of(node))

    def of(self, node: torch.fx.Node) -> frozenset[int]:
        return frozenset(map(self._find, self._of[node]))

    def nodes_in(self, storage: int) -> list[torch.fx.Node]:
        return self._in[self._find(storage)]

    def merge(self, left: frozenset[int], right: frozenset[int]) -> None:
        """These memories are one from now on."""
        into, *others = sorted(set(map(self._find, left | right))) or [0]
        for each in others:
            self._merged[each] = into
            self._in[into] = self._in[into] + self._in.pop(each, [])

    def _find(self, storage: int) -> int:
        while storage in self._merged:
            storage = self._merged[storage]
        return storage


def _viewed_by(node: torch.fx.Node) -> list[torch.fx.Node]:
    """The inputs that the result of ``node`` is a view of, by its operator's schema."""
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        return []
    schema = node.target._schema
    if all(each.alias_info is None for each in schema.returns):
        return []
    arguments = arguments_of(node)
    given = (arguments.get(each.name) for each in schema.arguments if each.alias_info is not None)
    return [each for each in given if isinstance(each, torch.fx.Node)]
