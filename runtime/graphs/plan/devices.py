"""Where captured code computes. In: a split graph and the names of what is captured. Out: the one device; it refuses what needs several.

It looks at what the trace knows of each value, and runs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.fx

from piecework.codegen.graph.origin import nodes_of, value_of
from piecework.errors import StaticGraphError
from piecework.runtime import torch_compat


def capture_device(
    split_gm: torch.fx.GraphModule, captured: Iterable[str], default: torch.device
) -> torch.device:
    """The device of every tensor in the submodules ``captured``; ``default`` if they have none.

    A graph belongs to one device. What is elsewhere would be read when it is captured, and its value then be a part of the graph.

    Raises:
        StaticGraphError: there are several; the message names one value on each of two.
    """
    found: dict[torch.device, str] = {}
    for name, node in nodes_of(split_gm, captured):
        for value in torch_compat.flatten_tree(value_of(node))[0]:
            if isinstance(value, torch.Tensor) and not _is_literal(node, value):
                found.setdefault(value.device, f"{node.name} of {name}")
    if len(found) < 2:
        return next(iter(found), default)
    (one, here), (other, there) = list(found.items())[:2]
    raise StaticGraphError(
        f"{here} is on {one}, and {there} is on {other}; a static graph has one device",
        where="capture",
        hint="move it to the model's device before the forward, or behind a splitting op, which runs between the graphs of its pieces",
    )


def _is_literal(node: torch.fx.Node, value: torch.Tensor) -> bool:
    """A number written in the model, which kernels on any device take by value."""
    return node.op == "get_attr" and value.dim() == 0
