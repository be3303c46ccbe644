"""Where a graph without splitting ops is cut: between alike modules, which are compiled once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.fx

from piecework.codegen.graph.origin import dotted_path, shapes_of
from piecework.codegen.graph.structure import call_text
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


def block_starts(
    gm: torch.fx.GraphModule,
    graph: torch.fx.Graph,
    named: Sequence[str] | None,
    regions: Regions,
    computes: Callable[[torch.fx.Node], bool],
) -> set[torch.fx.Node]:
    """The nodes of ``graph`` that begin a block, or what follows the last block of several."""

    def is_block(call: _Call) -> bool:
        if not regions.may_cut(call.nodes[0]):
            return False
        if named is not None:
            return call.path.rpartition(".")[0] in named
        convolves = any("conv" in getattr(node.target, "__name__", "") for node in call.nodes)
        return sum(map(computes, call.nodes)) >= _OPERATORS and not convolves

    found: set[torch.fx.Node] = set()
    holders: set[str] = set()
    pending = [_calls(graph, regions)]
    while pending:
        caller = pending.pop()
        kinds: dict[_Call, object] = {
            call: (call.kind, *(f"{call_text(gm, n)} {shapes_of([n], str)}" for n in call.nodes))
            for call in filter(is_block, caller.calls)
        }
        counts = Counter(kinds.values())
        least = _AT_LEAST if named is None else 2
        blocks = [call for call, kind in kinds.items() if counts[kind] >= least]
        starts = {call.nodes[0] for call in blocks}
        if blocks:
            holders |= {call.path.rpartition(".")[0] for call in blocks}
            rest = caller.nodes[caller.nodes.index(blocks[-1].nodes[-1]) + 1 :]
            after = rest[:1] if any(map(computes, rest)) else []
            found |= starts | set(filter(regions.may_cut, after))
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
