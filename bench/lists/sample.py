"""What is tried: how to build a model of a list, and its arguments for a batch size.

It runs no model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from piecework.integrations.protocol import Call

#: Sizes that every model is called at, the example's first; 0 only where the model itself runs with it.
BATCHES = (4, 1, 2, 5, 0)


@dataclass(frozen=True, slots=True)
class Sample:
    """One model with arguments."""

    # makes the model; each call gives an equal, independent one
    build: Callable[[], Callable[..., object]]
    # batch size → positional and keyword arguments, equal at each call
    arguments: Callable[[int], Call]
    # the batch size to trace with; -1 where the arguments have no batch dimension
    example: int = BATCHES[0]
    # further batch sizes; those that eager can't run are left out
    others: Sequence[int] = BATCHES[1:]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: a model of a list."""

    source: str  # the list
    name: str  # what the list calls it
    sample: Callable[[], Any]  # makes the `Sample`, or a family to generate with
    kind: str = ""  # what it is for, as far as the list tells


def resized(
    args: Sequence[object], kwargs: Mapping[str, object]
) -> tuple[int, Callable[[int], Call]]:
    """The batch size of example arguments, and a function that makes equal ones of another size.

    The batch size is the first dimension of the first tensor. Every tensor with that first dimension follows it: its rows are repeated
    or dropped. Without such a tensor the size is -1, and the arguments are always the example's.
    """
    call = (tuple(args), dict(kwargs))
    tensors = [leaf for leaf in pytree.tree_leaves(call) if isinstance(leaf, torch.Tensor)]
    first = next((tensor for tensor in tensors if tensor.dim()), None)
    if first is None or first.size(0) == 0:
        return -1, lambda _: copy.deepcopy(call)
    batch = first.size(0)

    def at(size: int) -> Call:
        def follow(leaf: object) -> object:
            if isinstance(leaf, torch.Tensor) and leaf.dim() and leaf.size(0) == batch != size:
                if leaf.stride(0) == 0:
                    return leaf[:1].expand(size, *leaf.shape[1:])
                return leaf[torch.arange(size) % batch]
            return copy.deepcopy(leaf)

        return pytree.tree_map(follow, call)  # type: ignore[no-any-return]

    return batch, at
