"""Which memory a graph writes to: told by the operators that its nodes reach on fake tensors.

An operator's schema says what it writes, and the memory that fake tensors share says whose it is. A
user's Triton kernel has no schema: its writes are not seen.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
from torch.utils import _pytree as pytree

from piecework.codegen.graph.origin import SymbolNames, graph_of, origin_of, results_of, value_of
from piecework.codegen.graph.structure import attribute_of, call_text
from piecework.errors import StaticGraphError
from piecework.runtime import torch_compat


@dataclass(frozen=True, slots=True)
class Mutation:
    """One write to a tensor that outlives the call."""

    path: str  # the tensor's path in the model, such as ``layers.0.cache``
    piece: str  # the submodule that holds the write
    node: str  # the graph's node
    op: str  # the operator whose schema says so, such as ``aten.add_.Tensor``
    where: str  # the model's file and line, as far as the trace knows it


def mutations_in(
    split_gm: torch.fx.GraphModule, pieces: Sequence[str], held: Mapping[str, str]
) -> tuple[Mutation, ...]:
    """The writes to held tensors, or views of them, inside ``pieces``."""
    paths: dict[int, str] = {}
    for node in split_gm.graph.find_nodes(op="placeholder"):
        key = memory_of(value_of(node))
        if node.name in held and key is not None:
            paths[key] = held[node.name]
    found, writes = [], _Writes(paths)
    for name in pieces:
        piece = graph_of(split_gm, name)
        for node in piece.graph.nodes:
            for op, key in writes.of(piece, node):
                origin = origin_of(node, SymbolNames())
                where = ", ".join(part for part in (origin.module, origin.source) if part)
                found.append(Mutation(paths[key], name, node.name, op, where))
    return tuple(dict.fromkeys(found))


def refuse_mutations(
    split_gm: torch.fx.GraphModule, pieces: Sequence[str], held: Mapping[str, str]
) -> None:
    """Raise for writes to the model's own tensors in captured pieces: warm-up would write too."""
    for first in mutations_in(split_gm, pieces, held or _held_by_source(split_gm)):
        why = f"{first.op} writes to {first.path} inside captured piece {first.piece}; warm-up and capture would write too"
        hint = "move the write into a piecework.splitting_op, keep the state in the forward context, or set cudagraph_mode to NONE"
        raise StaticGraphError(why, where=first.where or f"node {first.node}", hint=hint)


def _held_by_source(graph: torch.fx.GraphModule) -> dict[str, str]:
    """Placeholders that are parameters or buffers of a module, by what Dynamo calls them."""
    nodes = graph.graph.find_nodes(op="placeholder")
    sources = {node.name: torch_compat.placeholder_source(node) for node in nodes}
    held = ("._buffers[", "._parameters[")
    return {name: text for name, text in sources.items() if any(each in text for each in held)}


def written_inputs(piece: torch.fx.GraphModule, *, shared: bool = False) -> frozenset[int]:
    """Which placeholders of a graph, by number, lie in memory that it writes to."""
    inputs: dict[int, list[int]] = {}
    for number, node in enumerate(piece.graph.find_nodes(op="placeholder")):
        key = memory_of(value_of(node))
        if key is not None:
            inputs.setdefault(key, []).append(number)
    keys = [key for key, numbers in inputs.items() if len(numbers) > shared]
    return frozenset(number for key in written_memory(piece, keys) for number in inputs[key])


def unwritten_outputs(piece: torch.fx.GraphModule) -> frozenset[int]:
    """Which outputs of a graph, by number, lie in memory that it allocates and does not write."""
    from piecework.codegen.split.split import allocates

    first: dict[int, torch.fx.Node] = {}  # memory → the node that brings it
    for node in piece.graph.nodes:
        key = memory_of(value_of(node))
        if key is not None:
            first.setdefault(key, node)
    fresh = {key for key, node in first.items() if allocates(node)}
    fresh -= written_memory(piece, fresh).keys()
    nodes = [each for each in results_of(piece.graph) if isinstance(each, torch.fx.Node)]
    return frozenset(n for n, node in enumerate(nodes) if memory_of(value_of(node)) in fresh)


def written_later(graph: torch.fx.GraphModule, targets: Collection[object]) -> frozenset[object]:
    """Those operators that take or give memory which a later node of the graph writes to."""
    calls: list[tuple[int, object, set[int]]] = []
    for number, node in enumerate(graph.graph.nodes):
        if node.op == "call_function" and node.target in targets:
            values = pytree.tree_leaves([value_of(each) for each in (node, *node.all_input_nodes)])
            places = {key for each in values if (key := memory_of(each)) is not None}
            calls.append((number, node.target, places))
    written = written_memory(graph, {key for _, _, places in calls for key in places})
    return frozenset(
        target
        for number, target, places in calls
        if any(written.get(key, -1) > number for key in places)
    )


def written_memory(graph: torch.fx.GraphModule, memory: Collection[int]) -> dict[int, int]:
    """Which of some memory a graph writes to → the number of the last node that does."""
    writes = _Writes(memory)
    nodes = enumerate(graph.graph.nodes)
    return {key: number for number, node in nodes for _, key in writes.of(graph, node)}


def memory_of(value: object) -> int | None:
    """Which memory a strided tensor lies in; None for anything else."""
    strided = isinstance(value, torch.Tensor) and value.layout == torch.strided
    return torch_compat.storage_id(value) if strided else None  # type: ignore[arg-type]


class _Writes:
    """Which of some memory nodes write to; of calls with the same literals one is run."""

    def __init__(self, memory: Collection[int]) -> None:
        self._memory = memory
        self._known: dict[tuple[object, ...], list[tuple[str, int]]] = {}

    def of(self, module: torch.fx.GraphModule, node: torch.fx.Node) -> list[tuple[str, int]]:
        """``(operator, memory)`` of each write; what can't be run may write to all it takes."""
        if node.op not in ("call_function", "call_method", "call_module"):
            return []
        places = [memory_of(value_of(each)) for each in node.all_input_nodes]
        watched = list(dict.fromkeys(e for e in places if e is not None and e in self._memory))
        if not watched:
            return []
        every = [(str(node.target), key) for key in watched]
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            held = (each for each in node.all_input_nodes if each.op == "get_attr")
            bodies = (attribute_of(module, str(each.target)) for each in held)
            graphs = (each for each in bodies if isinstance(each, torch.fx.GraphModule))
            return every if any(map(written_inputs, graphs)) else []
        numbers = {key: n for n, key in enumerate(dict.fromkeys(places))}
        text = node if node.op == "call_module" else call_text(module, node)
        like = (text, *map(numbers.get, places), *map(numbers.get, watched))
        if like not in self._known:
            try:
                seen = _written_by(module, node)
            except Exception:  # noqa: BLE001 - user code and torch raise anything
                return every
            self._known[like] = [(op, watched.index(key)) for op, key in seen if key in watched]
        return [(op, watched[number]) for op, number in self._known[like]]


def _written_by(module: torch.fx.GraphModule, node: torch.fx.Node) -> list[tuple[str, int | None]]:
    """``(operator, memory)`` for each write that a run of ``node`` on fake values shows."""
    seen: list[tuple[str, int | None]] = []

    def note(op: torch._ops.OpOverload, args: tuple[object, ...], given: dict[str, object]) -> None:
        written = torch_compat.written_operands(op, args, given)
        seen.extend((str(op), memory_of(each)) for each in written)

    def given(argument: Any) -> Any:
        if not isinstance(argument, torch.fx.Node):
            return argument
        value = value_of(argument)
        if isinstance(value, torch.Tensor):
            # The same memory, so that writes are recognised; another tensor, so that a write that
            # changes sizes or strides leaves the recorded value alone.
            return value.data
        return attribute_of(module, str(argument.target)) if argument.op == "get_attr" else value

    args, kwargs = torch.fx.node.map_aggregate((node.args, dict(node.kwargs)), given)
    fakes = [v for each in node.all_input_nodes if (v := value_of(each)) is not None]
    watch = torch_compat.OperatorWatch(note, lambda *_: None, lambda *_: None)
    with torch_compat.on_fakes(fakes), watch:
        getattr(torch.fx.Interpreter(module), node.op)(node.target, args, kwargs)
    return seen
