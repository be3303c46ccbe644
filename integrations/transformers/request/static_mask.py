"""Masks of decode steps over static caches, by three operators on the device.

Transformers' own is made beside the first of each kind; where they differ, it is taken from then
on.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from transformers.cache_utils import Cache, StaticCache, StaticLayer

from piecework.integrations.transformers.request.state import Masks


class StaticMasks:
    """Makes the masks of one new token a sequence, where each sees all that came before it and is
    not hidden.
    """

    def __init__(self) -> None:
        self._places: dict[tuple[int, torch.device], torch.Tensor] = {}
        self._as_theirs: dict[Hashable, bool] = {}

    def mask(
        self,
        cache: Cache | None,
        attention_mask: object,
        batch: int,
        kind: Hashable,
        theirs: Callable[[], Masks],
    ) -> Masks:
        """The mask of the tokens behind those in ``cache``, [batch, 1, 1, length] of booleans.

        ``theirs`` makes it as transformers does; ``kind``: what else that may depend on.
        """
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
