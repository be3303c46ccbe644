"""The sizes that a compiled piece takes although none of its nodes reads them. In: a graph that is being cut. Out: for each piece, nodes to pass.

Compilers need them: to make views of a written input again, for arithmetic that they bring in (the N / (N - 1) of a variance), for
inputs whose shape is computed, and for what the trace asserted of sizes that only the data decides, which each piece checks again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

import torch
import torch.fx

from piecework.codegen.graph.origin import value_of
from piecework.codegen.split.sizes import symbol_of

#: Values of a piece → the symbols that what was asserted of them mentions.
Asserted = Callable[[Iterable[object]], Collection[object]]


class PieceSizes:
    """Finds the sizes of one graph.

    Args:
        graph: the graph.
        number_of: the partition of each computing node, in order of execution.
        asserted: which symbols the trace related to those of a piece.
    """

    def __init__(
        self,
        graph: torch.fx.Graph,
        number_of: Mapping[torch.fx.Node, int],
        asserted: Asserted | None,
    ) -> None:
        self._number_of = number_of
        self._asserted = asserted
        self._given: dict[object, torch.fx.Node] = {}  # symbol → the placeholder that is its value
        self._computed: dict[object, torch.fx.Node] = {}  # symbol → the node that computes it
        for node in graph.nodes:
            symbol = symbol_of(value_of(node))
            if symbol is not None:
                found = self._given if node.op == "placeholder" else self._computed
                if node.op == "placeholder" or node in number_of:
                    found.setdefault(symbol, node)

    def of(
        self, number: int, inputs: Collection[torch.fx.Node], members: Iterable[torch.fx.Node]
    ) -> list[torch.fx.Node]:
        """What piece ``number`` takes before everything else, in order of the graph: placeholders of sizes, and sizes computed earlier."""
        if not self._given and not self._computed:
            return []
        from torch.fx.experimental.symbolic_shapes import (
            free_symbols,
        )  # imports sympy, half a second

        values = list(map(value_of, inputs))
        shapes = [value for value in values if isinstance(value, torch.Tensor)]
        shaped = free_symbols(shapes)
        needed = set(shaped)
        if self._asserted is not None:
            needed |= set(self._asserted([*values, *map(value_of, members)]))
        leading = [
            node for symbol, node in self._given.items() if symbol in needed or node in inputs
        ]
        missing = needed - self._given.keys() - self._bound_by(values)
        return leading + [
            node
            for symbol, node in self._computed.items()
            if symbol in missing and self._number_of[node] < number
        ]

    @staticmethod
    def _bound_by(values: Iterable[object]) -> set[object]:
        """Symbols that are a size of an input as they are: a compiler reads them there."""
        sizes: list[object] = []
        for value in values:
            sizes += value.shape if isinstance(value, torch.Tensor) else [value]
        return {symbol for symbol in map(symbol_of, sizes) if symbol is not None}
