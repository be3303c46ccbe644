"""Values inside captured code: their one device, and numbers that must follow from the sizes."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
import torch.fx

from piecework.codegen.graph.origin import (
    SymbolNames,
    graph_of,
    nodes_of,
    origin_of,
    results_of,
    value_of,
)
from piecework.errors import StaticGraphError
from piecework.runtime import torch_compat

Numbers = Mapping[str, bool | int | float]


def capture_device(
    split_gm: torch.fx.GraphModule, captured: Iterable[str], default: torch.device
) -> torch.device:
    """The one device of all tensors in the submodules ``captured``; ``default`` without any."""
    found: dict[torch.device, str] = {}
    for name, node in nodes_of(split_gm, captured):
        for value in torch_compat.tensors_in(value_of(node)):
            # A number written in the model is taken by value, on any device.
            if not (node.op == "get_attr" and value.dim() == 0):
                found.setdefault(value.device, f"{node.name} of {name}")
    if len(found) < 2:
        return next(iter(found), default)
    (one, here), (other, there) = list(found.items())[:2]
    why = f"{here} is on {one}, and {there} is on {other}; a static graph has one device"
    hint = "move it to the model's device before the forward, or behind a splitting op"
    raise StaticGraphError(why, where="capture", hint=hint)


def require_sizes_only(split_gm: torch.fx.GraphModule, captured: Iterable[str]) -> None:
    """Refuse captured code with a size or number that is read from data, such as ``n.item()``."""
    inputs = split_gm.graph.find_nodes(op="placeholder")
    known = {symbol for node in inputs for symbol in _symbols(value_of(node))}
    for name, node in nodes_of(split_gm, captured):
        unknown = sorted(set(_symbols(value_of(node))) - known)
        if unknown and node.op != "output":
            origin = origin_of(node, SymbolNames())
            where = ", ".join(part for part in (origin.module, origin.source) if part)
            raise StaticGraphError(
                f"{node.name} in {name} depends on {unknown[0]}, which is read from data or made "
                "by an operator; a captured graph would keep the value that it had at the capture",
                where=where or f"node {node.name}",
                hint="make the size an argument of the model, keep the data-dependent part inside "
                "a splitting op, or run it uncaptured",
            )


def _symbols(value: object) -> Iterator[str]:
    for leaf in torch_compat.flatten_tree(value)[0]:
        sizes = [leaf]
        if isinstance(leaf, torch.Tensor):
            strides = leaf.stride() if leaf.layout is torch.strided else ()
            sizes = [*leaf.shape, *strides]
        for size in sizes:
            yield from torch_compat.symbols_in(size)


def sizes_of(inputs: Sequence[torch.fx.Node], values: Sequence[object]) -> dict[str, int]:
    """Symbol → its number, where ``inputs`` of a graph have ``values``."""
    found: dict[str, int] = {}
    for node, value in zip(inputs, values, strict=True):
        fake = value_of(node)
        if isinstance(fake, torch.Tensor) and isinstance(value, torch.Tensor):
            pairs = list(zip(fake.shape, value.shape, strict=True))
        else:
            pairs = [(fake, value)] if isinstance(value, int) else []
        for size, number in pairs:
            symbol = torch_compat.symbol_of(size)
            if symbol is not None:
                found[symbol] = number
    return found


def numbers_of(split_gm: torch.fx.GraphModule, sizes: Mapping[str, int]) -> Numbers:
    """Node name → number, for the nodes of a stitching graph that follow from ``sizes``."""
    found = {}
    for node in split_gm.graph.nodes:
        number = torch_compat.number_at(_value(split_gm, node), sizes)
        if number is not None:
            found[node.name] = number
    return found


def _value(split_gm: torch.fx.GraphModule, node: torch.fx.Node) -> object:
    """What was traced for ``node``, also where it is an element of a submodule's results."""
    value = value_of(node)
    if value is not None or node.op != "call_function" or len(node.args) != 2:
        return value
    call, index = node.args
    if not isinstance(call, torch.fx.Node) or call.op != "call_module" or type(index) is not int:
        return value
    results = results_of(graph_of(split_gm, str(call.target)).graph)
    result = results[index] if index < len(results) else None
    return value_of(result) if isinstance(result, torch.fx.Node) else result
