"""Decode steps: one new token of every sequence, with what all layers share settled once a forward.

Only transformers' own `sdpa` is done here; other requests are left to `RequestState.attend`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence, Set
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.cache_utils import Cache, DynamicLayer, StaticCache, StaticLayer

#: Room in a new buffer beyond the rows that there are: a quarter of them, and so many at least.
LEAST_ROOM = 64

LayerMasks = Mapping[str | None, torch.Tensor | None]
Pair = tuple[torch.Tensor, torch.Tensor]


class Step(Protocol):
    """How the attention layers of one forward attend, as `DecodeStep` does."""

    attend: Callable[..., None]


class DecodeStep:
    """A forward with one new token of each sequence, all attention by `sdpa`."""

    __slots__ = ("_added", "_batch", "_cache", "_dtype", "_indices", "_layout", "_masks", "_packed")
    __slots__ += ("_rows", "_written")

    def __init__(
        self, batch: int, cache: Cache, rows: CacheRows, masks: LayerMasks, dtype: torch.dtype
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
        """Store the new keys and values, attend, and write into ``out``."""
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
    """The rows of a captured batch that are a request's; those behind are finite in ``out``."""
    out[:, batch:].zero_()
    query, key, value = (each[:, :, :batch] for each in (query, key, value))
    return query, key, value, out[:, :batch]


def packed(
    shape: Sequence[int], strides: Sequence[int], shared: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Size and strides of [1, heads, batch, dim] as [batch, kv heads, heads of each, dim]."""
    _, heads, batch, dim = shape
    _, of_head, of_row, of_dim = strides
    each = heads // shared
    return (batch, shared, each, dim), (of_row, each * of_head, of_head, of_dim)


def masks_by_type(masks: object, kinds: Set[str | None]) -> LayerMasks | None:
    """The masks of a request by layer type; None if they are not of the usual form."""
    if not isinstance(masks, Mapping):
        masks = dict.fromkeys(kinds, masks)
    for mask in masks.values():
        usual = isinstance(mask, torch.Tensor) and mask.ndim == 4 and mask.shape[1:3] == (1, 1)
        if mask is not None and not usual:
            return None
    return masks if kinds <= masks.keys() else None


def additive(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """What `scaled_dot_product_attention` makes of a boolean mask."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    hidden = torch.full(mask.shape, -torch.inf, dtype=dtype, device=mask.device)
    return hidden.masked_fill_(mask, 0)


class GrowingRows:
    """The rows of a `DynamicLayer` in buffers with room; earlier views keep what they show."""

    __slots__ = ("_buffers", "_capacity", "_keys", "_layer", "_length", "_places", "_values")

    def __init__(self, layer: DynamicLayer) -> None:
        self._layer = layer
        self._keys = self._values = None
        self._length = self._capacity = 0

    def append(
        self, key: torch.Tensor, value: torch.Tensor, indices: dict[int, torch.Tensor]
    ) -> Pair | None:
        """The layer's keys and values with those of one more token; None where they don't fit."""
        layer, length = self._layer, self._length
        if (
            layer.keys is not self._keys
            or layer.values is not self._values
            or length == self._capacity
        ):
            if not self._move(key, value):
                return None
            length = self._length
        index = indices.get(length)
        if index is None:
            index = indices[length] = torch.full((1,), length, device=key.device)
        (keys, batch, heads, dim, strides), (values, _, _, value_dim, value_strides) = self._buffers
        places, value_places = self._places
        places.index_copy_(0, index, key)
        value_places.index_copy_(0, index, value)
        self._length = length = length + 1
        self._keys = layer.keys = keys.as_strided((batch, heads, length, dim), strides)
        self._values = layer.values = values.as_strided(
            (batch, heads, length, value_dim), value_strides
        )
        return self._keys, self._values

    def _move(self, key: torch.Tensor, value: torch.Tensor) -> bool:
        """Copy the rows to new buffers with room; False where rows like these can't follow them."""
        held = (self._layer.keys, self._layer.values)
        if not all(map(_continues, (key, value), held)) or held[0].shape[2] != held[1].shape[2]:
            return False
        self._length = length = held[0].shape[2]
        self._capacity = length + max(LEAST_ROOM, length // 4)
        grown = []
        for rows in held:
            batch, heads, _, dim = rows.shape
            buffer = rows.new_empty((batch, heads, self._capacity, dim))
            buffer.narrow(2, 0, length).copy_(rows)
            grown.append((buffer, batch, heads, dim, buffer.stride()))
        self._buffers = tuple(grown)
        self._places = tuple(buffer.transpose(0, 2) for buffer, *_ in grown)
        return True


class FixedRows:
    """The rows of a `StaticLayer`, which says itself where the next one goes."""

    __slots__ = ("_keys", "_layer", "_one", "_places", "_values")

    def __init__(self, layer: StaticLayer) -> None:
        self._layer = layer
        self._keys = self._values = self._places = None

    def append(
        self, key: torch.Tensor, value: torch.Tensor, indices: dict[int, torch.Tensor]
    ) -> Pair | None:
        """As `GrowingRows.append`; keys and values are of the layer's whole length."""
        layer = self._layer
        if self._places is None or layer.keys is not self._keys or layer.values is not self._values:
            held = (layer.keys, layer.values)
            inference = torch.is_inference_mode_enabled()
            if not all(map(_continues, (key, value), held)):
                return None
            if not inference and any(each.is_inference() for each in held):
                return None
            self._keys, self._values = held
            self._places = layer.keys.transpose(0, 2), layer.values.transpose(0, 2)
            self._one = torch.ones_like(layer.cumulative_length)
        places, value_places = self._places
        index = layer.cumulative_length
        places.index_copy_(0, index, key)
        value_places.index_copy_(0, index, value)
        index.add_(self._one)
        return self._keys, self._values


Rows = GrowingRows | FixedRows


class CacheRows:
    """The rows of each cache that a decoder has served, of transformers' plain layers alone."""

    def __init__(self) -> None:
        self._held: WeakKeyDictionary[Cache, tuple[bool, list[tuple[object, Rows | None]]]] = (
            WeakKeyDictionary()
        )

    def of(self, cache: Cache) -> list[Rows | None]:
        """Its layers' rows, None for other kinds; none of a cache with its own update."""
        own = type(cache).update is not Cache.update or "update" in vars(cache)
        if own or getattr(cache, "offloading", True):
            return []
        # What was made in inference mode can't be written to outside of it.
        inference = torch.is_inference_mode_enabled()
        made_so, known = self._held.get(cache, (inference, []))
        if made_so and not inference:
            known = []
        if [layer for layer, _ in known] != cache.layers:
            known = [(layer, _rows_of(layer)) for layer in cache.layers]
            made_so = inference
        self._held[cache] = (made_so or inference, known)
        return [rows for _, rows in known]


def _rows_of(layer: object) -> Rows | None:
    kind = {DynamicLayer: GrowingRows, StaticLayer: FixedRows}.get(type(layer))
    return None if kind is None or "update" in vars(layer) else kind(layer)


def _continues(new: torch.Tensor, rows: torch.Tensor | None) -> bool:
    """Whether ``new``, [1, heads, batch, dim], can follow rows of [batch, heads, rows, dim]."""
    return (
        rows is not None
        and rows.ndim == 4
        and (rows.shape[0], rows.shape[1], rows.shape[3])
        == (new.shape[2], new.shape[1], new.shape[3])
        and rows.dtype == new.dtype
        and rows.device == new.device
    )


class StaticMasks:
    """Masks of one new token over static caches, where transformers' own are the same."""

    def __init__(self) -> None:
        self._places: dict[tuple[int, torch.device], torch.Tensor] = {}
        self._as_theirs: dict[Hashable, bool] = {}

    def mask(
        self,
        cache: Cache | None,
        attention_mask: object,
        batch: int,
        kind: Hashable,
        theirs: Callable[[], Any],
    ) -> Any:
        """The mask of the tokens after those in ``cache``, [batch, 1, 1, length]."""
        kind = (kind, attention_mask is None)
        known = self._as_theirs.get(kind)
        made = None if known is False else self._made(cache, attention_mask, batch)
        if made is None:
            return theirs()
        if known is None:
            own = theirs()
            self._as_theirs[kind] = (
                isinstance(own, torch.Tensor) and own.dtype is torch.bool and torch.equal(made, own)
            )
            return own
        return made

    def _made(self, cache: Cache | None, attention_mask: object, batch: int) -> torch.Tensor | None:
        """The mask of a static cache of plain layers of one length; None for others."""
        if type(cache) is not StaticCache:
            return None
        first, *others = cache.layers
        if type(first) is not StaticLayer or not first.is_initialized:
            return None
        length, past = first.max_cache_len, first.cumulative_length
        if any(type(each) is not StaticLayer or each.max_cache_len != length for each in others):
            return None
        if attention_mask is not None and not (
            isinstance(attention_mask, torch.Tensor)
            and attention_mask.ndim == 2
            and attention_mask.shape[0] == batch
            and attention_mask.shape[1] <= length
            and attention_mask.device == past.device
        ):
            return None
        places = self._places.get((length, past.device))
        if places is None:
            with torch.inference_mode(False):  # or it could not be read outside of it
                places = torch.arange(length, device=past.device).view(1, 1, 1, length)
            self._places[length, past.device] = places
        seen = places <= past
        if not isinstance(attention_mask, torch.Tensor):
            return seen if batch == 1 else seen.expand(batch, 1, 1, length)
        given = attention_mask.shape[1]
        mask = seen.new_zeros((batch, length))  # what lies behind the end of a mask is hidden
        torch.logical_and(attention_mask, seen[0, 0, :, :given], out=mask[:, :given])
        return mask.view(batch, 1, 1, length)
