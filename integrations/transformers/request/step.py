"""Decode steps. In: one new token of every sequence of a batch, and its cache. Out: each layer's attention, with what all layers share settled once a forward.

Only transformers' own `sdpa` is done here, by the same torch operator on the same values; requests of any other kind are left to `RequestState.attend`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Protocol

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.cache_utils import Cache

from piecework.integrations.transformers.request.rows import CacheRows

LayerMasks = Mapping[str | None, torch.Tensor | None]


class Step(Protocol):
    """How the attention layers of one forward attend."""

    def attend(
        self,
        layer_idx: int,
        layer_type: str | None,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        scaling: float | None,
    ) -> None: ...


class DecodeStep:
    """One forward in which each sequence of a batch has one new token and all attention is `sdpa`.

    Args:
        batch: how many sequences.
        cache: their KV cache.
        rows: where its rows lie.
        masks: the layers' masks by layer type, or the one of them all under None.
        dtype: of masks that are made additive, which torch would otherwise do in each layer.
    """

    __slots__ = (
        "_added",
        "_batch",
        "_cache",
        "_dtype",
        "_indices",
        "_layout",
        "_masks",
        "_packed",
        "_rows",
        "_written",
    )

    def __init__(
        self,
        batch: int,
        cache: Cache,
        rows: CacheRows,
        masks: LayerMasks,
        dtype: torch.dtype,
    ) -> None:
        self._batch, self._cache, self._dtype = batch, cache, dtype
        self._rows = rows.of(cache)
        self._masks = masks
        added = {id(mask): additive(mask, dtype) for mask in masks.values()}
        self._added = {kind: added[id(mask)] for kind, mask in masks.items()}
        self._indices: dict[int, torch.Tensor] = {}
        self._layout: object = None

    def attend(
        self,
        layer_idx: int,
        layer_type: str | None,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        scaling: float | None,
    ) -> None:
        """Store the new keys and values, attend, and write into ``out``; shapes as of the splitting op."""
        layout = (query.shape, query.stride(), key.shape, out.shape, out.stride())
        if layout != self._layout:
            if query.shape[2] != self._batch:
                query, key, value, out = without_padding(self._batch, query, key, value, out)
                return self.attend(layer_idx, layer_type, query, key, value, out, scaling)
            self._packed = packed(query.shape, query.stride(), key.shape[1])
            turned = out.transpose(1, 2)
            self._written = packed(turned.shape, turned.stride(), key.shape[1])
            self._layout = layout
        held = self._rows[layer_idx] if layer_idx < len(self._rows) else None
        stored = None if held is None else held.append(key, value, self._indices)
        if stored is None:
            stored = self._cache.update(key.transpose(0, 2), value.transpose(0, 2), layer_idx)
        masks = self._added if query.dtype is self._dtype else self._masks
        attended = scaled_dot_product_attention(
            query.as_strided(*self._packed), *stored, masks[layer_type], scale=scaling
        )
        out.as_strided(*self._written).copy_(attended)


def without_padding(
    batch: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The rows of a captured batch that are a request's, of each tensor; those behind are nobody's, and finite in ``out``."""
    out[:, batch:].zero_()
    query, key, value = (each[:, :, :batch] for each in (query, key, value))
    return query, key, value, out[:, :batch]


def packed(
    shape: Sequence[int], strides: Sequence[int], shared: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Size and strides of [1, heads, batch, dim] as [batch, kv heads, heads of each, dim]: the heads that share keys are so many queries of one."""
    _, heads, batch, dim = shape
    _, of_head, of_row, of_dim = strides
    each = heads // shared
    return (batch, shared, each, dim), (of_row, each * of_head, of_head, of_dim)


def masks_by_type(masks: object, kinds: Set[str | None]) -> LayerMasks | None:
    """The masks of a request whose sequences have one new token each, by layer type; None if they are not of the usual form.

    Args:
        masks: of the request, one for all layers or one for each layer type.
        kinds: the layers' types.
    """
    if not isinstance(masks, Mapping):
        masks = dict.fromkeys(kinds, masks)
    elif not kinds <= masks.keys():
        return None
    if not all(mask is None or _same_for_heads(mask) for mask in masks.values()):
        return None
    return masks


def _same_for_heads(mask: object) -> bool:
    return isinstance(mask, torch.Tensor) and mask.ndim == 4 and mask.shape[1:3] == (1, 1)


def additive(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """What `scaled_dot_product_attention` makes of a boolean mask."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    hidden = torch.full(mask.shape, -torch.inf, dtype=dtype, device=mask.device)
    return hidden.masked_fill_(mask, 0)
