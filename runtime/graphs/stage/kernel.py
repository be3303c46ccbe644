"""Staging on a GPU: in, tensors and persistent buffers; out, all of them copied and padded by one kernel launch.

It never looks at dtypes: elements are copied as integers of their width, and padding is a bit pattern.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from piecework.runtime import torch_compat

# Sources are separate parameters, not a tuple: Triton specialises what is in a tuple, and would compile again
# for each combination of alignments.
SLOTS = 8
_BLOCK = 1024
_LARGEST_INT = 2**31 - 1
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


@dataclass(frozen=True, slots=True)
class Words:
    """One input as the kernel sees it.

    Attributes:
        dtype: the integer type of a word.
        target: the persistent buffer, flat, in words.
        outer: elements before the dynamic dimension.
        inner: words after it, for each step of the dynamic dimension.
        pad: the bit pattern that fills the tail, as a signed integer of the word's width.
    """

    dtype: torch.dtype
    target: torch.Tensor
    outer: int
    inner: int
    pad: int


class Launch:
    """Copies sources into the heads of their targets, as (outer, padded, inner), and pads what is beyond ``count``, in one launch.

    The first one goes through Triton's own look at every argument, and compiles. Later ones give what was compiled the addresses: nothing
    else about the arguments can change.

    Args:
        words: at most ``SLOTS`` inputs, on one device.
    """

    def __init__(self, words: Sequence[Words]) -> None:
        self._dtypes = [each.dtype for each in words]
        self._targets = tuple(each.target for each in words)
        self._places = tuple(target.data_ptr() for target in self._targets)
        self._largest = max(each.outer * each.inner for each in words)
        self._constants: dict[str, object] = {
            "OUTER": tuple(each.outer for each in words),
            "INNER": tuple(each.inner for each in words),
            "PADS": tuple(each.pad for each in words),
            "BLOCK": _BLOCK,
        }
        self._compiled: Any = None

    def __call__(self, sources: Sequence[torch.Tensor], count: int, padded: int) -> None:
        """Stage ``sources``, which are contiguous and laid out as (outer, count, inner)."""
        if self._largest * padded == 0:
            return
        blocks = -(-self._largest * padded // _BLOCK)
        more = SLOTS - len(sources)
        with _device_of(self._targets[0]):
            if self._compiled is None or padded > _LARGEST_INT:
                pairs = zip(sources, self._dtypes, strict=True)
                words = [source.detach().view(dtype) for source, dtype in pairs]
                words += [words[0]] * more
                launch = _stage[blocks, len(sources)]
                self._compiled = launch(*words, self._targets, count, padded, **self._constants)
                return
            made = self._compiled
            run, kernel, packed = made.run, made.function, made.packed_metadata
            places = [source.data_ptr() for source in sources]
            places += [places[0]] * more
            values = (*places, self._places, count, padded, *self._constants.values())
            stream = torch_compat.stream_number(self._targets[0].device)
            run(blocks, len(sources), 1, stream, kernel, packed, None, None, None, *values)


def _device_of(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device; make it the tensor's where it isn't."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)
