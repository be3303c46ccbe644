"""Autocast regions across cuts. In: a graph. Out: for each node, the regions that it runs in, so that each piece can open and close its own.

A region that stayed open from one piece to another would be lost: a compiled piece has no use for the state of its caller. Other
state that a graph sets (gradient mode) is left where it is set.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.fx

_ENTER, _EXIT = "_enter_autocast", "_exit_autocast"


def _is_border(node: torch.fx.Node, name: str) -> bool:
    target = node.target
    return (
        node.op == "call_function"
        and getattr(target, "__name__", None) == name
        and getattr(target, "__module__", "") == "torch.amp.autocast_mode"
    )


class Regions:
    """The nodes that open and close regions (``borders``), and the regions open at each other node, outermost first."""

    def __init__(self, graph: torch.fx.Graph) -> None:
        self.borders: set[torch.fx.Node] = set()
        self._around: dict[torch.fx.Node, tuple[torch.fx.Node, ...]] = {}
        self._exit: Callable[..., object] | None = None
        open_now: list[torch.fx.Node] = []
        for node in graph.nodes:
            if _is_border(node, _ENTER) and not node.all_input_nodes:
                open_now.append(node)
                self.borders.add(node)
            elif _is_border(node, _EXIT) and node.args and node.args[0] in open_now:
                open_now.remove(node.args[0])
                self._exit = cast(Callable[..., object], node.target)
                self.borders.add(node)
            elif open_now:
                self._around[node] = tuple(open_now)

    def around(self, node: torch.fx.Node) -> tuple[torch.fx.Node, ...]:
        return self._around.get(node, ())

    def writer(self, graph: torch.fx.Graph) -> RegionWriter:
        return RegionWriter(self, graph)

    @property
    def exit(self) -> Callable[..., object]:
        """The function that closes a region."""
        return self._exit or cast(Callable[..., object], getattr(torch.amp.autocast_mode, _EXIT))


class RegionWriter:
    """Opens and closes regions in a piece's graph, so that each node that is written next runs in its own."""

    def __init__(self, regions: Regions, graph: torch.fx.Graph) -> None:
        self._regions = regions
        self._graph = graph
        self._open: list[tuple[torch.fx.Node, torch.fx.Node]] = []

    def move_to(self, node: torch.fx.Node) -> None:
        wanted = self._regions.around(node)
        common = 0
        while common < min(len(wanted), len(self._open)) and (
            self._open[common][0] is wanted[common]
        ):
            common += 1
        self._close_to(common)
        for region in wanted[common:]:
            self._open.append((region, self._graph.node_copy(region)))

    def close(self) -> None:
        self._close_to(0)

    def _close_to(self, depth: int) -> None:
        while len(self._open) > depth:
            _, entered = self._open.pop()
            self._graph.call_function(self._regions.exit, (entered,))
