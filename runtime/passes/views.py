"""Chains of views made short. In: an aten graph. Out: the same values from fewer views.

A reshape of a reshape reads the first one's input, a slice of a slice is one slice, the same view is taken once, and slices that
make up a whole dimension are one split. Which values lie in the same memory stays as it was: nothing is done where a view is not
known to be one.
"""

from __future__ import annotations

import itertools
import operator
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.fx

from piecework.codegen.graph.origin import value_of
from piecework.runtime import torch_compat
from piecework.runtime.passes.nodes import arguments_of, outputs_of, same_layout, storages_of

_aten = torch.ops.aten
RESHAPES = (_aten.view.default, _aten.reshape.default, _aten._unsafe_view.default)
_SPLITS = (_aten.split_with_sizes.default, _aten.split.Tensor)
#: Taken once where two are the same: the results are views of the same memory, as far as the recorded values say so.
_TAKEN_ONCE = {*RESHAPES, *_SPLITS, _aten.slice.Tensor, operator.getitem}
TO_THE_END = 2**63 - 1

Index = int | torch.fx.Node


def shorten_chains(graph: torch.fx.Graph) -> int:
    """Apply what this module is about to ``graph``; returns how often."""
    matches = 0
    passed: list[torch.fx.Node] = []  # views that were read, and may not be any more
    seen: dict[object, torch.fx.Node] = {}
    outputs = set(outputs_of(graph))
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in RESHAPES:
            passed += _reshape_once(node)
        elif node.target is _aten.slice.Tensor:
            passed += _slice_once(node)
        first = seen.setdefault(_key(node), node) if node.target in _TAKEN_ONCE else node
        if first is not node and _same_view(first, node) and not {first, node} <= outputs:
            node.replace_all_uses_with(first)
            graph.erase_node(node)
            outputs = {first if each is node else each for each in outputs}
            matches += 1
    matches += len(passed)
    idle = dict.fromkeys(passed)
    while idle:
        node, _ = idle.popitem()
        if not node.users:
            idle.update((each, None) for each in node.all_input_nodes if each.target in _TAKEN_ONCE)
            graph.erase_node(node)
    return matches + _split_partitions(graph)


# --- reshapes ----------------------------------------------------------------------------------------


def _reshape_once(node: torch.fx.Node) -> list[torch.fx.Node]:
    """Let a reshape at the end of a chain of them read what the first one reads; returns the one before it, if so."""
    inner, memory = _source(node), storages_of(node)
    if inner is None or memory is None or not _is_contiguous(node):
        return []
    # Only of contiguous memory every reshape is a view, with the strides that its sizes give.
    chain = itertools.takewhile(lambda each: storages_of(each) == memory, _reshaped(inner))
    source = next((each for each in reversed(list(chain)) if _is_contiguous(each)), inner)
    if source is inner:
        return []
    node.replace_input_with(inner, source)
    return [inner]


def _reshaped(node: torch.fx.Node) -> Iterator[torch.fx.Node]:
    """``node``, what it is a reshape of, what that is one of, and so on."""
    source: torch.fx.Node | None = node
    while source is not None:
        yield source
        source = _source(source) if source.target in RESHAPES else None


def _is_contiguous(node: torch.fx.Node) -> bool:
    value = value_of(node)
    return (
        isinstance(value, torch.Tensor)
        and value.layout is torch.strided
        and torch_compat.is_traced_contiguous(value)
    )


# --- slices ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Slice:
    """``source[start:end:step]`` in one dimension; nothing in it is negative."""

    source: torch.fx.Node
    dim: int
    start: Index
    end: Index
    step: int


def _slice_once(node: torch.fx.Node) -> list[torch.fx.Node]:
    """Make a slice of a slice, in the same dimension, one slice; returns the first one, if so."""
    outer = _as_slice(node)
    inner = None if outer is None else _as_slice(outer.source)
    if outer is None or inner is None or outer.dim != inner.dim:
        return []
    start, end = _start_of(inner, outer), _end_of(inner, outer)
    if start is None or end is None:
        return []
    node.args = (inner.source, inner.dim, start, end, inner.step * outer.step)
    node.kwargs = {}
    return [outer.source]


def _start_of(inner: _Slice, outer: _Slice) -> Index | None:
    if isinstance(inner.start, int) and isinstance(outer.start, int):
        return min(inner.start + inner.step * outer.start, TO_THE_END)
    if outer.start == 0:
        return inner.start
    return outer.start if inner.start == 0 and inner.step == 1 else None


def _end_of(inner: _Slice, outer: _Slice) -> Index | None:
    if outer.end == TO_THE_END:
        return inner.end
    if inner.end == TO_THE_END and inner.start == 0 and inner.step == 1:
        return outer.end
    ends = (inner.start, inner.end, outer.end)
    if not all(isinstance(each, int) for each in ends):
        return None
    first, last, wanted = ends
    return min(last, first + inner.step * wanted)  # type: ignore[operator,type-var,return-value]


def _as_slice(node: torch.fx.Node) -> _Slice | None:
    """What ``node`` takes of its source, if it is a slice or one part of a split; None where a bound's sign is not known."""
    if node.op != "call_function":
        return None
    if node.target is operator.getitem:
        return _part(node)
    if node.target is not _aten.slice.Tensor:
        return None
    given = arguments_of(node)
    source, step = given["self"], given["step"]
    if not isinstance(source, torch.fx.Node) or not isinstance(step, int) or step < 1:
        return None
    place = _dimension(source, given["dim"])
    if place is None:
        return None
    dim, size = place
    start = _index(given["start"], 0, size)
    end = _index(given["end"], TO_THE_END, size)
    return None if start is None or end is None else _Slice(source, dim, start, end, step)


def _part(node: torch.fx.Node) -> _Slice | None:
    split, number = node.args
    if not isinstance(split, torch.fx.Node) or split.target not in _SPLITS:
        return None
    given = arguments_of(split)
    source = given["self"]
    place = _dimension(source, given["dim"])
    if place is None or not isinstance(number, int) or number < 0:
        return None
    sizes = given["split_sizes"] if "split_sizes" in given else given["split_size"]
    if isinstance(sizes, int):
        start, length = sizes * number, sizes
    elif all(isinstance(each, int) for each in sizes):  # type: ignore[attr-defined]
        start, length = sum(sizes[:number]), sizes[number]  # type: ignore[index]
    else:
        return None
    return _Slice(source, place[0], start, start + length, 1)  # type: ignore[arg-type]


def _dimension(source: object, dim: object) -> tuple[int, object] | None:
    """A dimension counted from the front, and its recorded size."""
    value = value_of(source) if isinstance(source, torch.fx.Node) else None
    if not isinstance(value, torch.Tensor) or not isinstance(dim, int) or not value.dim():
        return None
    dim %= value.dim()
    return dim, value.shape[dim]


def _index(given: object, default: int, size: object) -> Index | None:
    """A bound counted from the front; None where it is not known to be one."""
    if given is None:
        return default
    if type(given) is int:
        if given >= 0:
            return given
        return max(given + size, 0) if type(size) is int else None
    if isinstance(given, torch.fx.Node) and torch_compat.known_non_negative(value_of(given)):
        return given
    return None


def _split_partitions(graph: torch.fx.Graph) -> int:
    """Turn slices that make up a whole dimension of one value into the parts of a split."""
    groups: dict[tuple[torch.fx.Node, int], list[tuple[_Slice, torch.fx.Node]]] = defaultdict(list)
    for node in graph.find_nodes(op="call_function", target=_aten.slice.Tensor):
        found = _as_slice(node)
        if found is not None:
            groups[found.source, found.dim].append((found, node))
    replaced: dict[torch.fx.Node, torch.fx.Node] = {}
    matches = 0
    for (source, dim), found in groups.items():
        parts = _partition(source, dim, found)
        if parts is not None:
            _split_at(found[0][1], replaced.get(source, source), dim, parts, replaced)
            matches += 1
    return matches


def _split_at(
    first: torch.fx.Node,
    source: torch.fx.Node,
    dim: int,
    parts: list[tuple[torch.fx.Node, int]],
    replaced: dict[torch.fx.Node, torch.fx.Node],
) -> None:
    """Put a split in place of ``parts``, where ``first`` of them is; notes what is replaced by what."""
    graph = first.graph
    known = {name: each for name, each in first.meta.items() if name != "example_value"}
    with graph.inserting_before(first):
        split = graph.call_function(_SPLITS[0], (source, [size for _, size in parts], dim))
        items = [graph.call_function(operator.getitem, (split, n)) for n in range(len(parts))]
    split.meta = {**known, "val": tuple(value_of(node) for node, _ in parts)}
    for item, (node, _) in zip(items, parts, strict=True):
        item.meta = dict(node.meta)
        node.replace_all_uses_with(item)
        graph.erase_node(node)
        replaced[node] = item


def _partition(
    source: torch.fx.Node, dim: int, found: list[tuple[_Slice, torch.fx.Node]]
) -> list[tuple[torch.fx.Node, int]] | None:
    """The slices in order with their sizes, if there are several, none is empty, and each begins where the one before ends."""
    size = value_of(source).shape[dim]  # type: ignore[union-attr]
    whole = type(size) is int and all(
        each.step == 1
        and type(each.start) is int
        and type(each.end) is int
        and isinstance(value_of(node), torch.Tensor)
        for each, node in found
    )
    if len(found) < 2 or not whole:
        return None
    at = 0
    parts = []
    for each, node in sorted(found, key=lambda pair: pair[0].start):  # type: ignore[arg-type,return-value]
        end = min(each.end, size)  # type: ignore[type-var]
        if each.start != at or end <= at:  # type: ignore[operator]
            return None
        parts.append((node, end - at))  # type: ignore[operator]
        at = end  # type: ignore[assignment]
    return parts if at == size else None  # type: ignore[return-value]


# --- the same view, taken twice ----------------------------------------------------------------------


def _key(node: torch.fx.Node) -> object:
    if node.target is operator.getitem:
        return node.target, node.args
    return node.target, tuple(map(_hashable, arguments_of(node).values()))


def _hashable(value: object) -> object:
    if isinstance(value, (list, tuple)):
        return tuple(map(_hashable, value))
    return type(value), id(value) if isinstance(value, torch.SymInt) else value


def _same_view(first: torch.fx.Node, second: torch.fx.Node) -> bool:
    """Whether two nodes of one key are views of one memory, and not two copies."""
    source = _source(first)
    memory = storages_of(first)
    if source is None or not memory or memory != storages_of(second):
        return False
    if memory != storages_of(source):
        return False
    left, right = value_of(first), value_of(second)
    if isinstance(left, (tuple, list)) and isinstance(right, (tuple, list)):
        return all(map(same_layout, left, right))
    return same_layout(left, right)


def _source(node: torch.fx.Node) -> torch.fx.Node | None:
    source = node.args[0] if node.args else node.kwargs.get("self")
    return source if isinstance(source, torch.fx.Node) else None
