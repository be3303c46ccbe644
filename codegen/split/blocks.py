"""Where a graph that calls no splitting op can be cut: between blocks that are alike. In: a graph with the calls of modules that Dynamo recorded. Out: the nodes that a piece begins with.

A block is one call of a module. Blocks that are alike are calls that one module makes of modules of one class, with the same
operators on the same kinds of tensors; cut apart, they are one piece that is compiled once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.fx

from piecework.codegen.graph.origin import dotted_path
from piecework.codegen.graph.structure import (
    attribute_of,
    input_signature,
    new_placeholder,
    structure_of,
)
from piecework.codegen.split.regions import Regions
from piecework.errors import SplitError

#: Blocks that nobody named: so many alike, of so many operators each.
_AT_LEAST, _OPERATORS = 4, 8


@dataclass(eq=False, slots=True)
class _Call:
    """A call of a module: where the model has it, its class, and what ran in it."""

    path: str
    kind: str
    nodes: list[torch.fx.Node] = field(default_factory=list)
    calls: list[_Call] = field(default_factory=list)

    @property
    def holder(self) -> str:
        """The module that has it, which may be a list of modules."""
        return self.path.rpartition(".")[0]


def block_starts(
    gm: torch.fx.GraphModule,
    graph: torch.fx.Graph,
    named: Sequence[str] | None,
    regions: Regions,
    computes: Callable[[torch.fx.Node], bool],
) -> set[torch.fx.Node]:
    """The nodes of ``graph`` that begin a block, or what follows the last block of several.

    Args:
        gm: what holds the attributes that ``graph`` reads.
        named: dotted names of the modules whose children are blocks, two of a kind at least. None finds them: four of a kind,
            of eight operators each and none of them a convolution, whose layout of memory the compiler chooses for all at once.
        regions: those of ``graph``; what opens and closes them is no part of a block.
        computes: whether a node launches something.

    Raises:
        SplitError: a module that is named holds no blocks that are alike and can be cut.
    """
    found: set[torch.fx.Node] = set()
    holders: set[str] = set()
    pending = [_calls(graph, regions)]
    while pending:
        caller = pending.pop()
        calls = [call for call in caller.calls if regions.may_cut(call.nodes[0])]
        if named is None:
            calls = [call for call in calls if _is_large(call, computes)]
        else:
            calls = [call for call in calls if call.holder in named]
        blocks = list(_alike(calls, gm, _AT_LEAST if named is None else 2))
        starts = {call.nodes[0] for call in blocks}
        if blocks:
            found |= starts | _after(caller, blocks[-1], regions, computes)
            holders |= {call.holder for call in blocks}
        pending.extend(call for call in caller.calls if call.nodes[0] not in starts)
    unknown = sorted(set(named or ()) - holders)
    if unknown:
        raise SplitError(
            f"no two blocks that are alike are called from {', '.join(map(ascii, unknown))}",
            where="repeated_blocks",
            hint="name the module that holds them, such as 'encoder.layers', or use 'found' or 'off'",
        )
    return found


def _calls(graph: torch.fx.Graph, regions: Regions) -> _Call:
    """The calls in ``graph``, as a tree; a node without a record belongs to the call before it."""
    root = _Call("", "")
    chain: list[tuple[object, _Call]] = [(None, root)]
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr", "output") or node in regions.borders:
            continue
        stack = node.meta.get("nn_module_stack")
        if stack:
            depth = 0
            for key, (opened, _) in zip(stack, chain[1:], strict=False):
                if key != opened:
                    break
                depth += 1
            del chain[depth + 1 :]
            for key, (source, kind) in list(stack.items())[depth:]:
                call = _Call(dotted_path(source), str(kind))
                chain[-1][1].calls.append(call)
                chain.append((key, call))
        for _, call in chain:
            call.nodes.append(node)
    return root


def _is_large(call: _Call, computes: Callable[[torch.fx.Node], bool]) -> bool:
    """Whether ``call`` is worth a piece of its own."""
    if sum(map(computes, call.nodes)) < _OPERATORS:
        return False
    return not any("conv" in getattr(node.target, "__name__", "") for node in call.nodes)


def _alike(calls: Iterable[_Call], gm: torch.fx.GraphModule, at_least: int) -> Iterator[_Call]:
    """Those of ``calls`` that have their like, in their order."""
    calls = list(calls)
    classes = Counter(call.kind for call in calls)
    keyed = [
        (structure_of(_alone(call, gm), describe_input=input_signature).key, call)
        for call in calls
        if classes[call.kind] >= at_least
    ]
    kinds = Counter(key for key, _ in keyed)
    yield from (call for key, call in keyed if kinds[key] >= at_least)


def _alone(call: _Call, gm: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """``call`` as a graph of its own; what it takes from outside is an input, an attribute too."""
    graph = torch.fx.Graph()
    inside: dict[torch.fx.Node, torch.fx.Node] = {}
    attributes: dict[str, object] = {}
    for node in call.nodes:
        for source in node.all_input_nodes:
            if source not in inside:
                inside[source] = new_placeholder(graph, source.name)
                inside[source].meta.update(source.meta)
        inside[node] = graph.node_copy(node, lambda n: inside[n])
        if node.op == "call_module":
            attributes[str(node.target)] = attribute_of(gm, str(node.target))
    graph.output(())
    return torch.fx.GraphModule(attributes, graph)


def _after(
    caller: _Call,
    last: _Call,
    regions: Regions,
    computes: Callable[[torch.fx.Node], bool],
) -> set[torch.fx.Node]:
    """What ``caller`` runs first after its last block, if it computes anything there."""
    rest = caller.nodes[caller.nodes.index(last.nodes[-1]) + 1 :]
    return {rest[0]} if rest and regions.may_cut(rest[0]) and any(map(computes, rest)) else set()
