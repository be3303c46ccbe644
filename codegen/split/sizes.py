"""Whole-shape reads made per-dimension. In: a graph that is about to be cut. Out: the same graph without `x.size()`, `x.shape` and `torch.Size(…)` as one value.

A `torch.Size` can't cross a cut; integers and symbols can. Every form of consumer is rewritten, and nothing else is changed.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import cast

import torch
import torch.fx
from torch._ops import OpOverload, OpOverloadPacket
from torch.fx.node import Argument

from piecework.codegen.graph.origin import value_of

_SIZE_FUNCTIONS = (torch.ops.aten.sym_size.int, torch.ops.aten.sym_size)


def is_size_read(node: torch.fx.Node) -> bool:
    """True if ``node`` reads a size of a tensor, whole or one dimension."""
    if node.op == "call_method":
        return node.target in ("size", "dim", "numel", "stride")
    if node.op != "call_function":
        return False
    if node.target is getattr:
        return len(node.args) == 2 and node.args[1] in ("shape", "ndim")
    return node.target in _SIZE_FUNCTIONS


def _reads_whole_shape(node: torch.fx.Node) -> bool:
    if node.op == "call_method" and node.target == "size":
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        return dim is None
    return (
        node.op == "call_function"
        and node.target is getattr
        and len(node.args) == 2
        and node.args[1] == "shape"
    )


def decompose_sizes(graph: torch.fx.Graph) -> None:
    """Replace each whole-shape read by one read per dimension that is used, and each shape that is put together by its sizes, in place."""
    known = {None, *map(symbol_of, map(value_of, graph.find_nodes(op="placeholder")))}
    for node in list(graph.nodes):
        if _reads_whole_shape(node):
            rank = _rank(node)
            if rank is not None:
                sizes = _reads_of(graph, node, rank)
                _rewrite_users(graph, node, sizes)
                for read in (each for each in sizes if isinstance(each, torch.fx.Node)):
                    # Pieces may need a size that only the data decides, and find it by its read.
                    if not read.users and symbol_of(value_of(read)) in known:
                        graph.erase_node(read)
        elif node.op == "call_function" and node.target is torch.Size and not node.kwargs:
            parts = node.args[0] if node.args else ()
            if isinstance(parts, (list, tuple)):
                _rewrite_users(graph, node, cast(list[torch.fx.Node | int], list(parts)))


def symbol_of(size: object) -> object:
    """The symbol that a size is; None if it is a number or computed."""
    return size.node.expr if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol else None


def _rank(node: torch.fx.Node) -> int | None:
    for value in (value_of(node), value_of(cast(torch.fx.Node, node.args[0]))):
        if isinstance(value, torch.Tensor):
            return value.dim()
        if isinstance(value, (tuple, list)):
            return len(value)
    return None


def _reads_of(graph: torch.fx.Graph, node: torch.fx.Node, rank: int) -> list[torch.fx.Node | int]:
    """One read per dimension of what ``node`` reads whole; numbers where they are known."""
    tensor = cast(torch.fx.Node, node.args[0])
    shape = value_of(tensor)
    whole = value_of(node)
    sizes: list[torch.fx.Node | int] = []
    with graph.inserting_before(node):
        for dim in range(rank):
            size = (
                shape.shape[dim]
                if isinstance(shape, torch.Tensor)
                else cast(Sequence[object], whole)[dim] if whole is not None else None
            )
            fixed = size.node.maybe_as_int() if isinstance(size, torch.SymInt) else size
            if type(fixed) is int:
                sizes.append(fixed)
                continue
            read = graph.call_function(torch.ops.aten.sym_size.int, (tensor, dim))
            read.meta = {k: v for k, v in node.meta.items() if k not in ("example_value", "val")}
            if size is not None:
                read.meta["example_value"] = size
            sizes.append(read)
    return sizes


def _rewrite_users(
    graph: torch.fx.Graph, node: torch.fx.Node, sizes: list[torch.fx.Node | int]
) -> None:
    for user in list(node.users):
        _rewrite_user(graph, user, node, sizes)
    if not node.users:
        graph.erase_node(node)


def _rewrite_user(
    graph: torch.fx.Graph,
    user: torch.fx.Node,
    node: torch.fx.Node,
    sizes: list[torch.fx.Node | int],
) -> None:
    if user.target is operator.getitem and user.args[0] is node:
        index = user.args[1]
        if isinstance(index, int):
            _replace_with(graph, user, sizes[index])
            return
        if isinstance(index, slice) and not _has_node(index):
            chosen = sizes[index]
            for each in list(user.users):
                _rewrite_user(graph, each, user, chosen)
            if not user.users:
                graph.erase_node(user)
            return
    if not _takes_sizes(user, node):
        # It needs the torch.Size itself: have it again beside the user, so that the tensor or its sizes cross the cut instead.
        with graph.inserting_before(user):
            again = graph.node_copy(node)
        user.replace_input_with(node, again)
        return
    _swap(user, node, tuple(sizes))


def _takes_sizes(user: torch.fx.Node, node: torch.fx.Node) -> bool:
    """True if ``user`` does the same with a plain tuple of sizes as with a `torch.Size`."""
    if user.op == "output":
        return True
    if user.op == "call_method":
        return user.args[0] is not node
    if user.op != "call_function":
        return False
    if isinstance(user.target, (OpOverload, OpOverloadPacket)):
        return True
    module = getattr(user.target, "__module__", None) or ""
    return module.partition(".")[0] in ("torch", "_operator")


def _replace_with(graph: torch.fx.Graph, user: torch.fx.Node, size: torch.fx.Node | int) -> None:
    """Put ``size`` wherever ``user`` was used."""
    for each in list(user.users):
        _swap(each, user, size)
    graph.erase_node(user)


def _swap(user: torch.fx.Node, old: torch.fx.Node, new: Argument) -> None:
    """Put ``new`` wherever ``user`` takes ``old``, in any nesting."""
    user.args = torch.fx.node.map_arg(user.args, lambda n: new if n is old else n)
    user.kwargs = torch.fx.node.map_arg(user.kwargs, lambda n: new if n is old else n)


def _has_node(index: slice) -> bool:
    return any(isinstance(p, torch.fx.Node) for p in (index.start, index.stop, index.step))
