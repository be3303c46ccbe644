"""Staging by one kernel. In: buffers and the tensors for them. Out: all of them filled and padded by one launch, where the kernel can take them.

It loads Triton only when it is made.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import torch

from piecework.runtime.graphs.stage.slots import Slot

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class OneLaunch:
    """The one-launch way of filling the slots."""

    def __init__(self, slots: tuple[Slot, ...]) -> None:
        # Triton takes a while to import and is of no use without a GPU (or its interpreter).
        kernel = importlib.import_module("piecework.runtime.graphs.stage.kernel")
        self._slots = slots
        self._able = all(slot.buffer.element_size() in _WORDS for slot in slots)
        words = [kernel.Words(*_words(slot)) for slot in slots] if self._able else []
        firsts = range(0, len(words), kernel.SLOTS)
        self._launches = [(n, kernel.Launch(words[n : n + kernel.SLOTS])) for n in firsts]
        self._most = kernel.SLOTS

    def fits(self, tensors: Sequence[torch.Tensor], counts: tuple[int, ...]) -> bool:
        """Whether the kernel can take these: one batch size, dense, on the buffers' device, at most 64-bit elements."""
        return (
            self._able
            and len(set(counts)) == 1
            and all(
                tensor.is_contiguous() and tensor.device == slot.buffer.device
                for tensor, slot in zip(tensors, self._slots, strict=True)
            )
        )

    def launch(self, tensors: Sequence[torch.Tensor], count: int, padded: int) -> None:
        for first, launch in self._launches:
            launch(tensors[first : first + self._most], count, padded)


def _words(slot: Slot) -> tuple[torch.dtype, torch.Tensor, int, int, int]:
    """A slot as integers of its element's width: their type, its buffer, outer, inner, the pattern of its padding."""
    dtype = _WORDS[slot.buffer.element_size()]
    pattern = torch.tensor([slot.pad], dtype=slot.buffer.dtype).view(dtype).item()
    target = slot.buffer.detach().view(-1).view(dtype)
    return dtype, target, slot.outer, slot.inner, int(pattern)
