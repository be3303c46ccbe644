"""Staging on a GPU: all inputs copied and padded, as integers of their width, by one launch."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from piecework.runtime.graphs.stage.inputs import Slot

# Sources are separate parameters, not a tuple: Triton specialises what is in a tuple, and would
# compile again for each combination of alignments.
SLOTS = 8
_BLOCK = 1024
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_UNSPECIALISED = ["count", "padded", *(f"s{slot}" for slot in range(SLOTS))]


@triton.jit(do_not_specialize=_UNSPECIALISED, do_not_specialize_on_alignment=_UNSPECIALISED)
def _stage(
    s0,
    s1,
    s2,
    s3,
    s4,
    s5,
    s6,
    s7,
    targets,
    count,
    padded,
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
    PADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (b, i) writes block b of target i, laid out as (OUTER[i], padded, INNER[i])."""
    sources = (s0, s1, s2, s3, s4, s5, s6, s7)
    which = tl.program_id(1)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    for i in tl.static_range(len(targets)):
        if which == i:
            row_out = padded.to(tl.int64) * INNER[i]
            row_in = count.to(tl.int64) * INNER[i]
            outer = at // row_out
            inner = at - outer * row_out
            inside = at < OUTER[i] * row_out
            values = tl.load(
                sources[i] + outer * row_in + inner, mask=inside & (inner < row_in), other=PADS[i]
            )
            tl.store(targets[i] + at, values, mask=inside)


class OneLaunch:
    """Fills slots by one launch for each `SLOTS` of them, where the kernel can take the tensors."""

    def __init__(self, slots: tuple[Slot, ...]) -> None:
        self._slots = slots
        self._able = all(
            slot.buffer.element_size() in _WORDS and slot.dim is not None and not slot.spec.in_place
            for slot in slots
        )
        firsts = range(0, len(slots), SLOTS) if self._able else ()
        self._groups = [(n, [_Words(slot) for slot in slots[n : n + SLOTS]]) for n in firsts]

    def fits(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether these, of one batch size, are dense, on that device, of 64 bits at most."""
        return self._able and all(
            tensor.is_contiguous() and tensor.device == slot.buffer.device
            for tensor, slot in zip(tensors, self._slots, strict=True)
        )

    def launch(self, tensors: Sequence[torch.Tensor], count: int, padded: int) -> None:
        for first, group in self._groups:
            blocks = -(-max(each.outer * each.inner for each in group) * padded // _BLOCK)
            if not blocks:
                continue
            pairs = zip(tensors[first : first + SLOTS], group, strict=True)
            words = [tensor.detach().view(each.dtype) for tensor, each in pairs]
            words += [words[0]] * (SLOTS - len(group))
            targets = tuple(each.target for each in group)
            # Triton launches on the current device, and the CPU's tensors have no index.
            with torch.accelerator.device_index(targets[0].device.index):
                _stage[blocks, len(group)](
                    *words,
                    targets,
                    count,
                    padded,
                    OUTER=tuple(each.outer for each in group),
                    INNER=tuple(each.inner for each in group),
                    PADS=tuple(each.pad for each in group),
                    BLOCK=_BLOCK,
                )


class _Words:
    """A slot as integers of its element's width, flat, and the bit pattern of its padding."""

    def __init__(self, slot: Slot) -> None:
        self.dtype = _WORDS[slot.buffer.element_size()]
        self.target = slot.buffer.detach().view(-1).view(self.dtype)
        self.outer, self.inner = slot.outer, slot.inner
        pad = torch.tensor([slot.pad], dtype=slot.buffer.dtype)
        self.pad = int(pad.view(self.dtype).item())
