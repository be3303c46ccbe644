"""Writes to the model's own tensors inside captured pieces. In: a stitching graph with the fake values of its trace. Out: each write, with the operator and the line of the model.

What an operator writes is read from its schema, and what it writes to from the memory that fake tensors share; no name is trusted, and no data is touched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
from torch._ops import OpOverload, OpOverloadPacket
from torch.utils import _pytree as pytree

from piecework.codegen.graph.origin import SymbolNames, graph_of, origin_of, results_of, value_of
from piecework.codegen.graph.schemas import writes_to
from piecework.codegen.graph.structure import attribute_of, call_text
from piecework.codegen.split.split import allocates
from piecework.errors import StaticGraphError
from piecework.runtime import torch_compat


@dataclass(frozen=True, slots=True)
class Mutation:
    """One write to a tensor that outlives the call.

    Attributes:
        path: the tensor's path in the model, such as ``layers.0.cache``.
        piece: the submodule that holds the write.
        node: the graph's node.
        op: the operator whose schema says so, such as ``aten.add_.Tensor``.
        where: the model's file and line, as far as the trace knows it.
    """

    path: str
    piece: str
    node: str
    op: str
    where: str


def mutations_in(
    split_gm: torch.fx.GraphModule, pieces: Sequence[str], held: Mapping[str, str]
) -> tuple[Mutation, ...]:
    """The writes to held tensors, or views of them, inside ``pieces``.

    A node is looked at only if it takes memory of a held tensor, and of nodes that are alike one. An operator with a schema answers by it; any other
    callable is run once on fake tensors, and the operators that it reaches answer; one that can't be run counts as writing.
    A user's Triton kernel has no schema: its writes are not seen.

    Args:
        split_gm: the stitching graph (or a whole graph that holds the pieces as submodules), with fake values.
        pieces: submodules that are captured.
        held: placeholder of ``split_gm`` → path of the model's tensor behind it.
    """
    memory: dict[int, str] = {}
    for node in split_gm.graph.find_nodes(op="placeholder"):
        key = memory_of(value_of(node))
        if node.name in held and key is not None:
            memory[key] = held[node.name]
    found: list[Mutation] = []
    looks = _Looks()
    for name in pieces:
        piece = graph_of(split_gm, name)
        for node in piece.graph.nodes:
            for op, path in looks.writes(piece, node, memory):
                found.append(Mutation(path, name, node.name, op, _where(node)))
    return tuple(dict.fromkeys(found))


def written_inputs(piece: torch.fx.GraphModule) -> frozenset[int]:
    """Which placeholders of a graph, by number, it writes to, or to a view of; arguments that share memory with one too."""
    return _written(piece, _inputs_by_memory(piece))


def written_aliases(piece: torch.fx.GraphModule) -> frozenset[int]:
    """Those of `written_inputs` that share their memory with another input."""
    shared = {key: held for key, held in _inputs_by_memory(piece).items() if len(held) > 1}
    return _written(piece, shared) if shared else frozenset()


def unwritten_outputs(piece: torch.fx.GraphModule) -> frozenset[int]:
    """Which outputs of a graph, by number, lie in memory that it allocates and does not write: they hold anything."""
    first: dict[int, torch.fx.Node] = {}  # memory → the node that brings it
    for node in piece.graph.nodes:
        key = memory_of(value_of(node))
        if key is not None:
            first.setdefault(key, node)
    memory, looks = {key: str(key) for key, node in first.items() if allocates(node)}, _Looks()
    writes = (looks.writes(piece, node, memory) for node in piece.graph.nodes)
    written = {int(path) for found in writes for _, path in found}
    outputs = results_of(piece.graph)
    places = [_path(value_of(e), memory) if isinstance(e, torch.fx.Node) else None for e in outputs]
    return frozenset(n for n, e in enumerate(places) if e is not None and int(e) not in written)


def last_writes(graph: torch.fx.GraphModule, places: Iterable[int]) -> dict[int, int]:
    """Which of some memory a graph writes to → the number of the last node that does."""
    memory = {key: str(key) for key in places}
    looks, found = _Looks(), {}
    for number, node in enumerate(graph.graph.nodes):
        found.update({int(path): number for _, path in looks.writes(graph, node, memory)})
    return found


def written_later(graph: torch.fx.GraphModule, targets: Collection[object]) -> frozenset[object]:
    """Those of some operators that are called on memory, or give some, that a later node of the graph writes to."""
    calls: list[tuple[int, object, set[int]]] = []
    for number, node in enumerate(graph.graph.nodes):
        if node.op == "call_function" and node.target in targets:
            values = pytree.tree_leaves([value_of(each) for each in (node, *node.all_input_nodes)])
            places = {memory_of(each) for each in values} - {None}
            calls.append((number, node.target, places))  # type: ignore[arg-type]
    written = last_writes(graph, {key for _, _, places in calls for key in places})
    return frozenset(
        target
        for number, target, places in calls
        if any(written.get(key, -1) > number for key in places)
    )


def copies_by_layout(graph: torch.fx.GraphModule) -> Iterator[tuple[int, int, frozenset[int]]]:
    """Nodes that copy what they take only where that does not lie in memory in a certain order, as ``contiguous`` and ``reshape`` do.

    Yields:
        The node's number, the memory of its result, and that of what it takes. A node that can't be run by itself is one of them.
    """
    known: dict[tuple[object, ...], bool] = {}
    for number, node in enumerate(graph.graph.nodes):
        own = memory_of(value_of(node))
        if node.op not in ("call_function", "call_method") or own is None:
            continue
        taken = {memory_of(value_of(each)) for each in node.all_input_nodes} - {None}
        if own in taken or not taken:
            continue
        literals = torch.fx.node.map_aggregate((node.args, node.kwargs), _literal)  # type: ignore[arg-type]
        like = (node.op, node.target, repr(literals))
        if like not in known:
            known[like] = _clones_in_order(graph, node)
        if known[like]:
            yield number, own, frozenset(each for each in taken if each is not None)


def _literal(argument: object) -> object:
    return None if isinstance(argument, torch.fx.Node) else argument


def _clones_in_order(graph: torch.fx.GraphModule, node: torch.fx.Node) -> bool:
    orders: list[object] = []

    def note(op: torch._ops.OpOverload, _: object, kwargs: dict[str, object]) -> None:
        if op is torch.ops.aten.clone.default:
            orders.append(kwargs.get("memory_format"))

    try:
        _run(graph, node, note)
    except Exception:  # noqa: BLE001 - user code and torch raise anything
        return True
    return any(each not in (None, torch.preserve_format) for each in orders)


OperatorCall = tuple[torch._ops.OpOverload, Sequence[object], Mapping[str, object]]


def operator_calls(piece: torch.fx.GraphModule) -> Iterator[OperatorCall]:
    """The operators that a graph and the graphs in it reach, with their arguments, found by running each node by itself on fake tensors.

    A node that can't be run by itself is left out.
    """
    for graph in (each for each in piece.modules() if isinstance(each, torch.fx.GraphModule)):
        for node in graph.graph.nodes:
            if node.op not in ("call_function", "call_method"):
                continue
            seen: list[OperatorCall] = []
            with contextlib.suppress(Exception):  # user code and torch raise anything
                _run(graph, node, lambda *call, seen=seen: seen.append(call))
            yield from seen


def _inputs_by_memory(piece: torch.fx.GraphModule) -> dict[int, list[int]]:
    """Memory → the placeholders, by number, that lie in it."""
    found: dict[int, list[int]] = {}
    for number, node in enumerate(piece.graph.find_nodes(op="placeholder")):
        key = memory_of(value_of(node))
        if key is not None:
            found.setdefault(key, []).append(number)
    return found


def _written(piece: torch.fx.GraphModule, inputs: Mapping[int, list[int]]) -> frozenset[int]:
    """Those of ``inputs`` whose memory a node writes to."""
    memory, looks = {key: str(key) for key in inputs}, _Looks()
    paths = {path for node in piece.graph.nodes for _, path in looks.writes(piece, node, memory)}
    return frozenset(number for path in paths for number in inputs[int(path)])


def held_by_source(graph: torch.fx.GraphModule) -> dict[str, str]:
    """Placeholders that are parameters or buffers of a module, by what Dynamo calls them; for graphs from ``torch.compile``."""
    nodes = graph.graph.find_nodes(op="placeholder")
    sources = {node.name: torch_compat.placeholder_source(node) for node in nodes}
    held = ("._buffers[", "._parameters[")
    return {name: text for name, text in sources.items() if any(each in text for each in held)}


def refuse_mutations(found: Sequence[Mutation]) -> None:
    """Raise for writes to the model's own tensors inside captured pieces.

    A static graph is warmed up and captured by running it, so a buffer that a piece advances would be advanced too often.

    Raises:
        StaticGraphError: there is one; the first is named and the others are counted.
    """
    if not found:
        return
    first, more = found[0], len(found) - 1
    others = f" (and {more} more)" if more else ""
    raise StaticGraphError(
        f"{first.op} writes to {first.path} inside captured piece {first.piece}{others}; warm-up and capture would "
        "write too",
        where=first.where or f"node {first.node}",
        hint="move the write into a piecework.splitting_op, keep the state in the forward context, or set "
        "cudagraph_mode to NONE",
    )


def _where(node: torch.fx.Node) -> str:
    origin = origin_of(node, SymbolNames(), line_numbers=True)
    return ", ".join(part for part in (origin.module, origin.source) if part)


def computes(target: object) -> bool:
    """Whether a function computes values of its arguments, as torch's own functions and Python's operators do. One from elsewhere may change
    how the operators after it run (a level of ``torch.func``, a mode), and what the dispatcher showed of them is not what is compiled.
    """
    if isinstance(target, (OpOverload, OpOverloadPacket)):
        return True
    module = getattr(target, "__module__", None)
    return module in _COMPUTING or (module, getattr(target, "__name__", None)) in _SETTING


_COMPUTING = frozenset(
    (
        *("_operator", "builtins", "math", "torch", "torch.functional", "torch.nn.functional"),
        *("torch._C._nn", "torch._C._linalg", "torch._C._fft", "torch._C._special"),
    )
)
# No operators either, but what the dispatcher shows after them is what is compiled.
_SETTING = frozenset(
    (
        ("torch._C", "_log_api_usage_once"),
        ("torch._C", "_set_grad_enabled"),
        ("torch.amp.autocast_mode", "_enter_autocast"),
        ("torch.amp.autocast_mode", "_exit_autocast"),
    )
)


class _Looks:
    """What nodes write to, each kind of node looked at once: layers are alike, and a graph has many."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], list[tuple[str, int]]] = {}

    def writes(
        self, module: torch.fx.GraphModule, node: torch.fx.Node, memory: Mapping[int, str]
    ) -> list[tuple[str, str]]:
        """``(operator, path)`` for each held tensor that ``node`` writes to."""
        if node.op not in ("call_function", "call_method", "call_module"):
            return []
        paths = list(
            dict.fromkeys(p for n in node.all_input_nodes if (p := _path(value_of(n), memory)))
        )
        if not paths:
            return []
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            return self._of_higher_order(module, node, memory)
        like = _likeness(module, node, memory, paths)
        known = None if like is None else self._known.get(like)
        if known is not None:
            return [(op, paths[number]) for op, number in known]
        found = _observed(module, node, memory, paths)
        if like is not None and all(path in paths for _, path in found):
            self._known[like] = [(op, paths.index(path)) for op, path in found]
        return found

    def _of_higher_order(
        self, module: torch.fx.GraphModule, node: torch.fx.Node, memory: Mapping[int, str]
    ) -> list[tuple[str, str]]:
        """Writes in the graphs that a higher-order operator runs, whose placeholders carry its operands' memory."""
        found: list[tuple[str, str]] = []
        for each in node.all_input_nodes:
            if each.op != "get_attr":
                continue
            body = attribute_of(module, str(each.target))
            if isinstance(body, torch.fx.GraphModule):
                inner = {**memory, **_memory_of_operands(body, node, memory)}
                for step in body.graph.nodes:
                    found += self.writes(body, step, inner)
        target = node.args[0] if node.args else None
        if node.target in torch_compat.auto_functionalized_ops() and isinstance(
            target, torch._ops.OpOverload
        ):
            for argument in target._schema.arguments:
                path = _path(_fake(node.kwargs.get(argument.name)), memory)
                if path is not None and writes_to(argument):
                    found.append((str(target), path))
        return found


def _likeness(
    module: torch.fx.GraphModule,
    node: torch.fx.Node,
    memory: Mapping[int, str],
    paths: Sequence[str],
) -> tuple[object, ...] | None:
    """All that decides what a node writes to: the operator, its literals, and of each value what can be asked of it, with the memory it lies in.

    None for nodes that are looked at each time: what they call may be anybody's code, or a value of theirs shows more than that.
    """
    if not (node.op == "call_method" or (node.op == "call_function" and computes(node.target))):
        return None
    numbers: dict[int, int] = {}  # of storages, in order of first sight

    def of(value: object) -> tuple[object, ...] | None:
        if type(value) in (tuple, list):
            parts = [of(each) for each in value]  # type: ignore[attr-defined]
            return None if None in parts else (type(value), *parts)
        traits = torch_compat.traits_of(value)
        if traits is None or not isinstance(value, torch.Tensor):
            return traits
        path, where = _path(value, memory), torch_compat.storage_id(value)
        held = paths.index(path) if path else None
        return (*traits, numbers.setdefault(where, len(numbers)), held)

    values = [
        None if each.op == "get_attr" else of(value_of(each)) for each in node.all_input_nodes
    ]
    return None if None in values else (call_text(module, node), *values)


def _observed(
    module: torch.fx.GraphModule,
    node: torch.fx.Node,
    memory: Mapping[int, str],
    paths: Sequence[str],
) -> list[tuple[str, str]]:
    """What a node is seen to write to when it runs on fake values; what can't be run again may write to all that it takes."""
    seen: list[tuple[str, str]] = []

    def note(op: torch._ops.OpOverload, args: tuple[object, ...], given: dict[str, object]) -> None:
        for written in torch_compat.written_operands(op, args, given):
            path = _path(written, memory)
            if path is not None:
                seen.append((str(op), path))

    try:
        _run(module, node, note)
    except Exception:  # noqa: BLE001 - user code and torch raise anything
        return [(str(node.target), path) for path in paths]
    return seen


def memory_of(value: object) -> int | None:
    """Which memory a strided tensor lies in; None for anything else."""
    strided = isinstance(value, torch.Tensor) and value.layout == torch.strided
    return torch_compat.storage_id(value) if strided else None  # type: ignore[arg-type]


def _path(value: object, memory: Mapping[int, str]) -> str | None:
    key = memory_of(value)
    return None if key is None else memory.get(key)


def _memory_of_operands(
    body: torch.fx.GraphModule, node: torch.fx.Node, memory: Mapping[int, str]
) -> dict[int, str]:
    """Memory of the body's placeholders: the operands come last among the operator's arguments, in their order."""
    placeholders = body.graph.find_nodes(op="placeholder")
    operands: list[torch.fx.Node] = []
    torch.fx.node.map_arg(node.args, operands.append)
    operands = [each for each in operands if each.op != "get_attr" or _path(value_of(each), memory)]
    count = len(placeholders)
    inner: dict[int, str] = {}
    for placeholder, operand in zip(placeholders, operands[len(operands) - count :], strict=False):
        path, key = _path(value_of(operand), memory), memory_of(value_of(placeholder))
        if path is not None and key is not None:
            inner[key] = path
    return inner


def _fake(argument: object) -> object:
    return value_of(argument) if isinstance(argument, torch.fx.Node) else argument


# --- one node on fake tensors ----------------------------------------------------------------------


def _run(module: torch.fx.GraphModule, node: torch.fx.Node, notes: Callable[..., None]) -> None:
    """Run one node on the fake values of its inputs, held apart from the recorded ones."""
    args, kwargs = torch.fx.node.map_aggregate((node.args, dict(node.kwargs)), _stand_in(module))
    fakes = [v for each in node.all_input_nodes if (v := value_of(each)) is not None]
    with torch_compat.watching_operators(notes, fakes):
        match node.op:
            case "call_method":
                getattr(args[0], str(node.target))(*args[1:], **kwargs)
            case "call_module":
                module.get_submodule(str(node.target))(*args, **kwargs)
            case _:
                assert callable(node.target)
                node.target(*args, **kwargs)


def _stand_in(module: torch.fx.GraphModule) -> Callable[[Any], Any]:
    def of(argument: Any) -> Any:  # whatever a node takes
        if not isinstance(argument, torch.fx.Node):
            return argument
        value = value_of(argument)
        if isinstance(value, torch.Tensor):
            # The same memory, so that writes are recognised; another tensor, so that a write that changes
            # sizes or strides leaves the recorded value alone.
            return value.data
        return attribute_of(module, str(argument.target)) if argument.op == "get_attr" else value

    return of
