"""What passes ask about a graph's nodes. In: nodes with fake values. Out: their arguments by name, and which share memory.

Nothing here changes a graph.
"""

from __future__ import annotations

import torch
import torch.fx
from torch._ops import OpOverload

from piecework.codegen.graph.origin import value_of
from piecework.runtime import torch_compat


def arguments_of(node: torch.fx.Node) -> dict[str, object]:
    """The arguments of an operator call by name, given by position, by keyword or by default.

    Raises:
        TypeError: the node calls no operator overload, or gives an argument that the operator does not have.
    """
    if not isinstance(node.target, OpOverload):
        raise TypeError(f"%{node.name} calls no operator overload")
    schema = node.target._schema.arguments
    if len(node.args) > len(schema) or not set(node.kwargs) <= {each.name for each in schema}:
        raise TypeError(f"%{node.name} does not fit {node.target}")
    found = dict(zip((each.name for each in schema), node.args, strict=False)) | node.kwargs
    for each in schema:
        if each.name not in found and each.has_default_value():
            found[each.name] = each.default_value
    return found


def storages_of(node: torch.fx.Node) -> frozenset[int] | None:
    """The memory that the value of ``node`` lies in, as `torch_compat.storage_id`; None when it is not known."""
    value = value_of(node)
    if isinstance(value, torch.Tensor):
        return frozenset({torch_compat.storage_id(value)})
    if isinstance(value, (tuple, list)):
        tensors = (each for each in value if isinstance(each, torch.Tensor))
        return frozenset(map(torch_compat.storage_id, tensors))
    if isinstance(value, (int, float, bool, str, torch.SymInt, torch.SymFloat, torch.SymBool)):
        return frozenset()
    return None


def same_layout(left: object, right: object) -> bool:
    """Whether two fake tensors agree in dtype, device, sizes, strides and offset, for every value of their symbols."""
    if not isinstance(left, torch.Tensor) or not isinstance(right, torch.Tensor):
        return False
    if (left.dtype, left.device, left.layout) != (right.dtype, right.device, right.layout):
        return False
    if left.layout != torch.strided or left.dim() != right.dim():
        return False
    pairs = zip((*left.shape, *left.stride()), (*right.shape, *right.stride()), strict=True)
    offsets = (left.storage_offset(), right.storage_offset())
    return all(torch_compat.statically_equal(a, b) for a, b in (*pairs, offsets))


def outputs_of(graph: torch.fx.Graph) -> list[torch.fx.Node]:
    """The nodes that the graph returns."""
    return list(graph.output_node().all_input_nodes)
