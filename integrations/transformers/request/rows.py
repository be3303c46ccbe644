"""Where the rows of a KV cache lie. In: a cache of transformers, and the keys and values of one new token a sequence. Out: the same cache one token longer, written in place.

It writes only where nobody reads yet, and knows transformers' own plain layers alone: whatever else a cache is made of grows as transformers has it.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

#: Room in a new buffer beyond the rows that there are: a quarter of them, and so many at least.
LEAST_ROOM = 64

Pair = tuple[torch.Tensor, torch.Tensor]


class GrowingRows:
    """The rows of a `DynamicLayer`, in buffers with room behind them; its ``keys`` and ``values`` are views of the rows that there are.

    A row is written once, behind all that any view shows, so whoever holds earlier keys keeps what they saw. Where the layer holds other
    tensors than the last step left there (it was cropped, reordered, repeated, replaced, or grew by several tokens), they are
    copied to new buffers first.
    """

    __slots__ = ("_buffers", "_capacity", "_keys", "_layer", "_length", "_places", "_values")

    def __init__(self, layer: DynamicLayer) -> None:
        self._layer = layer
        self._keys = self._values = None
        self._length = self._capacity = 0

    def append(
        self, key: torch.Tensor, value: torch.Tensor, indices: dict[int, torch.Tensor]
    ) -> Pair | None:
        """The layer's keys and values with those of one more token; None where they don't fit to those that it has.

        Args:
            key, value: [1, kv heads, batch, dim].
            indices: number of a row → an index tensor of it, shared by all layers of a forward.
        """
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
        """Copy the rows that the layer has to new buffers with room; False where rows like these can't follow them."""
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
            if not all(map(_continues, (key, value), held)) or not all(map(_writable, held)):
                return None
            self._keys, self._values = layer.keys, layer.values
            self._places = layer.keys.transpose(0, 2), layer.values.transpose(0, 2)
            self._one = torch.ones_like(layer.cumulative_length)
        places, value_places = self._places
        index = layer.cumulative_length
        places.index_copy_(0, index, key)
        value_places.index_copy_(0, index, value)
        index.add_(self._one)
        return self._keys, self._values


Rows = GrowingRows | FixedRows
_KINDS = {DynamicLayer: GrowingRows, StaticLayer: FixedRows}


class CacheRows:
    """The rows of each cache that a decoder has served, for as long as the cache lives."""

    def __init__(self) -> None:
        self._held: WeakKeyDictionary[Cache, tuple[bool, list[tuple[object, Rows | None]]]] = (
            WeakKeyDictionary()
        )

    def of(self, cache: Cache) -> list[Rows | None]:
        """Its layers' rows by their index; None for a layer of another kind, and none at all of a cache that updates them in its own way."""
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
    kind = _KINDS.get(type(layer))
    if kind is None or "update" in vars(layer):
        return None
    return kind(layer)


def _continues(new: torch.Tensor, rows: torch.Tensor | None) -> bool:
    """Whether ``new``, [1, heads, batch, dim], can follow the rows of a layer, [batch, heads, rows, dim]."""
    return (
        rows is not None
        and rows.ndim == 4
        and (rows.shape[0], rows.shape[1], rows.shape[3])
        == (new.shape[2], new.shape[1], new.shape[3])
        and rows.dtype == new.dtype
        and rows.device == new.device
    )


def _writable(rows: torch.Tensor) -> bool:
    return torch.is_inference_mode_enabled() or not rows.is_inference()
