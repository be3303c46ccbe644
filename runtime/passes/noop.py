"""Remove operations that change nothing. In: an aten graph. Out: the graph without reshapes, slices and slice_scatters that give back their input, and with short chains of views.

It never makes two outputs, or an output and an input, the same memory where they were not.
"""

from __future__ import annotations

import torch
import torch.fx

from piecework.codegen.graph.origin import value_of
from piecework.codegen.graph.schemas import writes_to
from piecework.runtime.passes.interface import InductorPass
from piecework.runtime.passes.memory import Memory
from piecework.runtime.passes.nodes import arguments_of, outputs_of, same_layout, storages_of
from piecework.runtime.passes.views import TO_THE_END, shorten_chains

_aten = torch.ops.aten
# operator → the argument that it gives back when it changes nothing
_SOURCE = {
    _aten.view.default: "self",
    _aten.reshape.default: "self",
    _aten._unsafe_view.default: "self",
    _aten.slice.Tensor: "self",
    _aten.slice_scatter.default: "src",
}


class NoOpEliminationPass(InductorPass):
    """Replaces a reshape to the same shape, a slice of everything and a slice_scatter over everything by its input.

    What an operation does is read from the recorded values, so that it does not matter whether its arguments are
    positional, named or left out, nor whether sizes are numbers or symbols. Without recorded values only a slice that
    says "from the start to the end" is removed. Chains of views are made short first (`passes.views`).
    """

    def __call__(self, graph: torch.fx.Graph) -> int:
        matches = shorten_chains(graph)
        while found := self._eliminate(graph):
            matches += found + shorten_chains(graph)
        return matches

    def _eliminate(self, graph: torch.fx.Graph) -> int:
        outputs = outputs_of(graph)
        memory = Memory(graph)
        matches = 0
        for node in list(graph.nodes):
            source = _unchanged_source(node)
            if source is not None and _may_stand_for(source, node, graph, outputs, memory):
                memory.merge(memory.of(source), memory.of(node))
                node.replace_all_uses_with(source)
                graph.erase_node(node)
                outputs = [source if each is node else each for each in outputs]
                matches += 1
        return matches


def _unchanged_source(node: torch.fx.Node) -> torch.fx.Node | None:
    """The node that ``node`` equals in value and layout, if it is one of the known operations."""
    if node.op != "call_function" or node.target not in _SOURCE:
        return None
    arguments = arguments_of(node)
    source = arguments.get(_SOURCE[node.target])
    if not isinstance(source, torch.fx.Node):
        return None
    if same_layout(value_of(node), value_of(source)):
        return source
    known = value_of(node) is not None and value_of(source) is not None
    whole = (
        node.target is _aten.slice.Tensor
        and not known
        and arguments["start"] in (None, 0)
        and arguments["step"] == 1
        and (arguments["end"] is None or arguments["end"] == TO_THE_END)
    )
    return source if whole else None


def _may_stand_for(
    source: torch.fx.Node,
    node: torch.fx.Node,
    graph: torch.fx.Graph,
    outputs: list[torch.fx.Node],
    memory: Memory,
) -> bool:
    """Whether giving ``source`` to every user of ``node`` keeps which values share memory at the graph's border.

    Callers of the compiled graph were told while tracing which outputs are fresh and which are views.
    """
    if node in outputs and (source.op == "placeholder" or source in outputs):
        return False
    if storages_of(node) is None or storages_of(source) is None:
        return node not in outputs and node.target is _aten.slice.Tensor  # a slice is always a view
    own, given = memory.of(node), memory.of(source)
    if own == given:
        return True
    # A copy is replaced by what it copied: wrong if the copy is seen outside and the original is too, and if one
    # of the two is written to later.
    border = [*graph.find_nodes(op="placeholder"), *outputs]
    seen = frozenset().union(*map(memory.of, border))
    return not (own & seen and given & seen) and not _is_written(own | given, graph, memory)


def _is_written(storages: frozenset[int], graph: torch.fx.Graph, memory: Memory) -> bool:
    """Whether an operator of ``graph`` writes into this memory."""
    for node in graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is None or not schema.is_mutable:
            continue
        arguments = arguments_of(node)
        for each in schema.arguments:
            target = arguments.get(each.name)
            if not writes_to(each):
                continue
            if not isinstance(target, torch.fx.Node):
                continue
            if storages_of(target) is None or memory.of(target) & storages:
                return True
    return False
