"""Whether a graph may be compiled with a batch size that has no number behind it. In: a traced graph, whole or a piece. Out: why not, or None.

Compilers lose copies, strides and checks on such sizes in more operators than anybody listed, so this is an allow-list: every operator
is in the table and marked plain, every value has the batch in one dimension alone, no index or number is made of it, and no stride of what enters or leaves.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
import torch.fx
from torch._ops import HigherOrderOperator

from piecework.codegen.graph.origin import value_of
from piecework.runtime.analysis.rows.call import Call, computes, is_own
from piecework.runtime.analysis.rows.rule import Rule
from piecework.runtime.analysis.rows.table import is_random
from piecework.runtime.analysis.rows.verdict import rows_of
from piecework.runtime.analysis.state import Batch, Mixes, Rows, symbols_in
from piecework.runtime.analysis.writes import copies_by_layout, last_writes, memory_of


def admits_unbacked(
    graph: torch.fx.GraphModule,
    symbols: Collection[str],
    *,
    outside: Collection[str] = (),
    rows_in_one: bool = False,
) -> str | None:
    """Why ``graph`` may not be compiled with the sizes ``symbols`` unbacked; None if it may.

    Args:
        graph: with fake values in its nodes, as a Dynamo backend gets it, or a piece of it.
        symbols: torch's names of the batch size, such as ``{"s0"}``; other symbols stay as they are.
        outside: operators that the graph is cut at, ``"namespace::name"``; they are not compiled, and may be anything.
        rows_in_one: values are ``[1, rows, …]``, so that the batch size is in the stride of the first dimension, which nothing reads; and
            whatever a piece's results are handed to takes them in any order in memory.

    Example:
        >>> reason = admits_unbacked(graph, {"s0"}, outside=("my::attention",))
        >>> reason is None or "max" in reason
        True
    """
    held = Batch(symbols)
    for node in graph.graph.nodes:
        value = value_of(node)
        if node.op == "placeholder" and isinstance(value, torch.Tensor):
            said = _of_value(value, held) or _of_strides(value, held, rows_in_one)
            if said is not None:
                return f"argument {node.name} {said}"
        if isinstance(node.target, HigherOrderOperator):
            return f"{node.target.name()} runs a graph of its own"
        if node.op == "call_function" and not computes(node.target):
            return f"{node.name} is no operator: it changes what those after it mean"
    names = frozenset(outside)
    verdict = rows_of(graph, symbols, lambda *call: _of_call(names, *call), outside=names)
    return (
        next(iter(verdict.complaints), None)
        or verdict.refused
        or (None if rows_in_one else _of_what_leaves(graph, held))
    )


def written_copies(graph: torch.fx.GraphModule) -> str | None:
    """Why a whole graph, with the operators that it is cut at, can't serve a size of 1 as it serves others; None if it can.

    There what ``contiguous`` or ``reshape`` copies is in order already and is not copied, and a write to either is a write to both.
    """
    copies = list(copies_by_layout(graph))
    written = last_writes(graph, {key for _, own, taken in copies for key in (own, *taken)})
    if not written:
        return None
    used, nodes = _last_uses(graph), list(graph.graph.nodes)
    for number, own, taken in copies:
        pairs = [pair for each in taken for pair in ((own, each), (each, own))]
        if any(written.get(one, -1) > number and used[other] > number for one, other in pairs):
            return f"{nodes[number].name} is no copy where the batch is one row, and it or what it is a copy of is written to"
    return None


def _last_uses(graph: torch.fx.GraphModule) -> dict[int, float]:
    """Memory → the number of the last node that has to do with it; infinity where it is an argument's or a result's, which outlive the graph."""
    used: dict[int, float] = {}
    for number, node in enumerate(graph.graph.nodes):
        for each in (node, *node.all_input_nodes):
            key = memory_of(value_of(each))
            if key is not None:
                outlives = each.op == "placeholder" or node.op == "output"
                used[key] = math.inf if outlives else max(number, used.get(key, 0))
    return used


def _of_what_leaves(graph: torch.fx.GraphModule, held: Batch) -> str | None:
    """What is wrong with a result. Inside, a compiler's order in memory is its own; what leaves must have the order that was traced,
    and Inductor sees to that for strides without such a size alone.
    """
    for node in graph.graph.output_node().all_input_nodes:
        value = value_of(node)
        said = _of_strides(value, held, False) if isinstance(value, torch.Tensor) else None
        if said is not None:
            return f"result {node.name} {said}"
    return None


def _of_call(
    outside: frozenset[str], call: Call, rule: Rule | None, answers: Sequence[Rows]
) -> str | None:
    """What is wrong with one operator."""
    if call.op._schema.name in outside:
        return _of_results(call)
    if is_own(call.op):
        return "is not torch's own"
    tensors = (*call.inputs(), *call.results, *call.written)
    if not any(map(call.batch.held_by, tensors)) and not is_random(call.op):
        return _of_numbers(call, frozenset())
    if is_random(call.op) or rule is None or not rule.plain:
        return "is not known to be compiled right where the batch size has no number behind it"
    mixed = next((each.mixed for each in answers if each.mixed is not None), None)
    if mixed is not None:
        return f"mixes rows: {mixed}"
    return _of_numbers(call, rule.sizes) or _of_results(call)


def _of_numbers(call: Call, sizes: frozenset[str]) -> str | None:
    """Symbolic numbers that are no sizes, and dimensions that go by what a symbol happens to be."""
    if call.name == "_local_scalar_dense":
        return "makes a number of data"
    if call.name == "squeeze" and "dim" not in call.args and call.batch.held_by(call.results):
        return "drops dimensions that happen to be one"
    if call.name == "expand" and _count(call, call.results[0]) > _count(call, call.tensor("self")):
        return "lists one element as often as the batch has rows"
    for name, value in call.args.items():
        if name in sizes and call.name != "slice":
            continue
        listed = value if isinstance(value, (list, tuple)) else [value]
        for each in listed:
            if not isinstance(each, torch.Tensor) and any(True for _ in symbols_in(each)):
                return f"takes a symbolic {name}"
    return None


def _count(call: Call, tensor: torch.Tensor) -> int:
    return len(call.batch.dims_of(tensor))


def _of_results(call: Call) -> str | None:
    for each in call.results:
        said = _of_value(each, call.batch)
        if said is not None:
            return f"gives a value that {said}"
    return None


def _of_value(value: torch.Tensor, batch: Batch) -> str | None:
    """The batch in one dimension, alone or times whole numbers."""
    try:
        rows = batch.plain_rows(value)
    except Mixes as reason:
        return f"has {reason}"
    if len(rows.dims) > 1:
        return "has the batch size in several dimensions"
    if value.layout != torch.strided:
        return f"has layout {value.layout}"
    if batch.held_by(value.storage_offset()):
        return "begins in memory where the batch size says"
    return None


def _of_strides(value: torch.Tensor, batch: Batch, rows_in_one: bool) -> str | None:
    """The batch in no stride that matters."""
    pairs = list(zip(value.shape, value.stride(), strict=True))
    if rows_in_one:
        pairs = [each for each in pairs if not (type(each[0]) is int and each[0] == 1)]
    if batch.held_by(tuple(step for _, step in pairs)):
        return "has a stride that is made of the batch size"
    return None
