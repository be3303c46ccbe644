"""Requests without content, for capturing static graphs: attention computes nothing in them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from piecework.errors import StaticGraphError
from piecework.integrations.transformers.request.state import (
    AttentionLayer,
    RequestState,
    request_context,
)
from piecework.runtime.batch.descriptor import BatchDescriptor
from piecework.runtime.batch.forward_context import ForwardContext, set_forward_context
from piecework.runtime.batch.mode import CUDAGraphMode


@contextmanager
def dry_request(
    mode: CUDAGraphMode, descriptor: BatchDescriptor
) -> Iterator[ForwardContext | None]:
    """The context of a run on dummy tokens; the ``context_for`` of a capture.

    Example:
        >>> stitched_module(model).capture([1, 2, 4], context_for=dry_request, pad=True)
        >>> model.generate(ids)  # decoding steps replay

    Raises:
        StaticGraphError: the mode is FULL: the graph would hold the attention of the dummy request.
    """
    if mode is CUDAGraphMode.FULL:
        raise StaticGraphError(
            "a full graph would freeze the attention of a dummy request",
            where=descriptor.describe(),
            hint="capture in mode PIECEWISE, or decode steps of static caches by "
            "stitch(model, capture=..., max_cache_len=...)",
        )
    state = RequestState(
        layers=_EveryLayer(),
        batch=1,
        tokens=descriptor.num_tokens,
        implementation=_no_attention,
        masks=None,
        cache=None,
        position_ids=torch.zeros(1, descriptor.num_tokens, dtype=torch.long),
        paged={},
    )
    scope = set_forward_context(cudagraph_runtime_mode=mode, batch_descriptor=descriptor)
    with scope as context, request_context(state):
        yield context


class _EveryLayer(dict[str, AttentionLayer]):
    """Any layer's name, with nothing behind it."""

    def __missing__(self, name: str) -> AttentionLayer:
        return AttentionLayer(name, torch.nn.Identity(), 0, None, frozenset())


def _no_attention(
    module: object, query: torch.Tensor, key: object, value: torch.Tensor, *_: object, **__: object
) -> tuple[torch.Tensor, None]:
    """Zeros of the result's shape: [batch, tokens, heads, value dim]."""
    batch, heads, tokens, _dim = query.shape
    return query.new_zeros(batch, tokens, heads, value.shape[3]), None
