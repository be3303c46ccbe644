"""Staging on a GPU: in, tensors and persistent buffers; out, all of them copied and padded by one kernel launch.

It never looks at dtypes: elements are copied as integers of their width, and padding is a bit pattern.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

# Sources are separate parameters, not a tuple: Triton specialises what is in a tuple, and would compile again
# for each combination of alignments.
SLOTS = 8
_BLOCK = 1024
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
class StagedTensor:
    """One input of a launch.

    Attributes:
        source: contiguous, laid out as (outer, count, inner), in integer words.
        target: the persistent buffer, flat, in the same words.
        outer: elements before the dynamic dimension.
        inner: words after it, for each step of the dynamic dimension.
        pad: the bit pattern that fills the tail, as a signed integer of the word's width.
    """

    source: torch.Tensor
    target: torch.Tensor
    outer: int
    inner: int
    pad: int


def stage_in_one_launch(tensors: Sequence[StagedTensor], count: int, padded: int) -> None:
    """Copy each source into the head of its target, as (outer, padded, inner), and pad what is beyond ``count``.

    Args:
        tensors: at most ``SLOTS`` of them, on one device.
        count: size of the sources' dynamic dimension.
        padded: size of the targets' dynamic dimension.
    """
    sources = [each.source for each in tensors]
    sources += [sources[0]] * (SLOTS - len(sources))
    largest = max(each.outer * each.inner for each in tensors) * padded
    if largest == 0:
        return
    grid = (triton.cdiv(largest, _BLOCK), len(tensors))
    with _device_of(tensors[0].target):
        _stage[grid](
            *sources,
            tuple(each.target for each in tensors),
            count,
            padded,
            OUTER=tuple(each.outer for each in tensors),
            INNER=tuple(each.inner for each in tensors),
            PADS=tuple(each.pad for each in tensors),
            BLOCK=_BLOCK,
        )


def _device_of(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device; make it the tensor's where it isn't."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)
