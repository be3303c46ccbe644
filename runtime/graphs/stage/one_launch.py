"""Staging by one kernel. In: buffers and the tensors for them. Out: all of them filled and padded by one launch, where the kernel can take them.

It loads Triton only when it is made.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from piecework.runtime.graphs.stage.slots import Slot

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class OneLaunch:
    """The one-launch way of filling the slots."""

    def __init__(self, slots: tuple[Slot, ...]) -> None:
        # Triton takes a while to import and is of no use without a GPU (or its interpreter).
        self._kernel = importlib.import_module("piecework.runtime.graphs.stage.kernel")
        self._slots = slots
        self._words = tuple(_words(slot) for slot in slots)

    def fits(self, tensors: Sequence[torch.Tensor], counts: tuple[int, ...]) -> bool:
        """Whether the kernel can take these: one batch size, dense, on the buffers' device, at most 64-bit elements."""
        return len(set(counts)) == 1 and all(
            words is not None and tensor.is_contiguous() and tensor.device == slot.buffer.device
            for words, tensor, slot in zip(self._words, tensors, self._slots, strict=True)
        )

    def launch(self, tensors: Sequence[torch.Tensor], count: int, padded: int) -> None:
        staged = [
            self._kernel.StagedTensor(
                tensor.detach().view(words.dtype), words.target, slot.outer, slot.inner, words.pad
            )
            for tensor, words, slot in zip(tensors, self._words, self._slots, strict=True)
            if words is not None
        ]
        for first in range(0, len(staged), self._kernel.SLOTS):
            chunk = staged[first : first + self._kernel.SLOTS]
            self._kernel.stage_in_one_launch(chunk, count, padded)


@dataclass(frozen=True, slots=True)
class _Words:
    """A buffer as integers of its element's width."""

    dtype: torch.dtype
    target: torch.Tensor
    pad: int


def _words(slot: Slot) -> _Words | None:
    dtype = _WORDS.get(slot.buffer.element_size())
    if dtype is None:
        return None
    pattern = torch.tensor([slot.pad], dtype=slot.buffer.dtype).view(dtype).item()
    return _Words(dtype, slot.buffer.detach().view(-1).view(dtype), int(pattern))
