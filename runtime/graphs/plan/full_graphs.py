"""Which whole forwards may be captured. In: a mode, and what the operators between the pieces say. Out: the mode that can be, its decode lengths, and why it is another.

It captures nothing; without an operator that says something, the mode stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import get_args

import torch
import torch.fx

from piecework.codegen.graph.origin import nodes_of
from piecework.runtime.batch.mode import CUDAGraphMode
from piecework.runtime.splitting_op import GraphsOf, registry

_ORDER: tuple[GraphsOf, ...] = get_args(GraphsOf)


def full_graphs_of(split_gm: torch.fx.GraphModule, between: Iterable[str]) -> dict[str, GraphsOf]:
    """What the operators in the submodules ``between`` say, by their names."""
    found: dict[str, GraphsOf] = {}
    for _, node in nodes_of(split_gm, between):
        if isinstance(node.target, torch._ops.OpOverload):
            found[node.target._schema.name] = registry.graphs_of(node.target)
    return found


def negotiated(
    mode: CUDAGraphMode, said: Mapping[str, GraphsOf], query_lens: Sequence[int]
) -> tuple[CUDAGraphMode, tuple[int, ...], str]:
    """The most of ``mode`` that every operator can be captured in.

    Args:
        said: operator → which whole forwards may be captured with it inside.
        query_lens: tokens of each request in a decode batch, where drafts differ in width.

    Returns:
        The mode; the query lengths that decode graphs can have; and why these are less than what was asked for, "" if not.

    Example:
        >>> said = {"my::attention": "single_token_decode"}
        >>> mode, lens, why = negotiated(CUDAGraphMode.FULL, said, (1, 4))
        >>> mode.name, lens, why
        ('FULL_AND_PIECEWISE', (1,), 'my::attention can be captured whole for single_token_decode only')
    """
    lens = tuple(query_lens)
    if not mode.has_mode(CUDAGraphMode.FULL) or not said:
        return mode, lens, ""
    weakest = min(said, key=lambda name: _ORDER.index(said[name]))
    why = f"{weakest} can be captured whole for {said[weakest]} only"
    match said[weakest]:
        case "always":
            return mode, lens, ""
        case "uniform_decode":
            able = lens
        case "single_token_decode":
            able = tuple(n for n in lens if n == 1)
        case _:
            able, why = (), f"{weakest} can't be captured in a whole forward"
    mixed = mode.mixed_mode()
    if not able:
        return (CUDAGraphMode.PIECEWISE if mixed is CUDAGraphMode.FULL else mixed), lens, why
    if mixed is CUDAGraphMode.FULL:
        return CUDAGraphMode.FULL_AND_PIECEWISE, able, why
    return mode, able, "" if able == lens else why
