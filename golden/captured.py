"""Arguments of a captured graph. In: a `StitchedModule` and a call's arguments. Out: one value for each placeholder of its graph.

Weights are found by the path that the source gives, sizes by the symbol that the capture gave them. Nothing is run.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence

import torch

from piecework.codegen.graph.origin import value_of
from piecework.codegen.graph.structure import attribute_of
from piecework.errors import UsageError
from piecework.runtime.stitched import StitchedModule


def graph_arguments(
    stitched: StitchedModule, call: Sequence[object], where: str
) -> tuple[object, ...]:
    """What ``stitched.split_gm`` takes when the model is called with ``call``; ``where`` is for errors.

    Raises:
        UsageError: a placeholder cannot be traced back to a weight, an argument or a size.
    """
    placeholders = stitched.split_gm.graph.find_nodes(op="placeholder")
    model = stitched.model
    weights = {row.name: row.path for row in stitched.source.module.bound}
    given = _by_name(model.forward if isinstance(model, torch.nn.Module) else model, call)
    fakes = {node.name: value_of(node) for node in placeholders if node.name in given}
    sizes = _sizes(fakes, given)
    values: list[object] = []
    for node in placeholders:
        fake = value_of(node)
        if node.name in weights and isinstance(model, torch.nn.Module):
            values.append(attribute_of(model, weights[node.name]))
        elif node.name in given:
            values.append(given[node.name])
        elif isinstance(fake, torch.SymInt) and str(fake) in sizes:
            values.append(sizes[str(fake)])
        else:
            raise UsageError(
                f"placeholder {node.name!a} is neither a weight, an argument nor the size of one",
                where=where,
                hint="give the model's arguments by position, one tensor each, from inputs()",
            )
    return tuple(values)


def _by_name(forward: object, call: Sequence[object]) -> dict[str, object]:
    assert callable(forward)
    return dict(inspect.signature(forward).bind(*call).arguments)


def _sizes(fakes: Mapping[str, object], given: Mapping[str, object]) -> dict[str, int]:
    """The value of each symbol that is a dimension of an argument."""
    sizes: dict[str, int] = {}
    for name, fake in fakes.items():
        value = given[name]
        if isinstance(fake, torch.Tensor) and isinstance(value, torch.Tensor):
            for symbol, size in zip(fake.shape, value.shape, strict=True):
                if isinstance(symbol, torch.SymInt):
                    sizes[str(symbol)] = int(size)
    return sizes
