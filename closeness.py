"""Whether two runs of one computation gave the same, up to what another kernel may change.

Another batch size, thread count or compiler takes other kernels, which add in another order, so
floating values are compared by a tolerance of their dtype, relative to the largest value beside
them. Whole numbers and truth values must be equal.
"""

from __future__ import annotations

import math

import torch

# Of the largest value: a few roundings over many layers. Products of float32 may be TF32's.
_TOLERANCE = {
    torch.float64: 1e-6,
    torch.complex128: 1e-6,
    torch.float32: 1e-3,
    torch.complex64: 1e-3,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}
_COARSEST = 0.25  # of what has fewer bits than these
SMALLEST = 1e-3  # values below are compared as if the largest beside them were this


def tolerance_of(dtype: torch.dtype) -> float:
    """How far values of ``dtype`` may be apart, as a part of the largest; 0 for whole numbers.

    Example:
        >>> tolerance_of(torch.float32), tolerance_of(torch.int64)
        (0.001, 0.0)
    """
    inexact = dtype.is_floating_point or dtype.is_complex
    return _TOLERANCE.get(dtype, _COARSEST) if inexact else 0.0


def apart(
    right: torch.Tensor, given: torch.Tensor, tolerance: float
) -> tuple[float, float, float] | None:
    """The largest error of ``given``, what is allowed, the largest value; None if it is alike."""
    wide = torch.complex128 if right.is_complex() else torch.float64
    right, given = right.detach().to(wide), given.detach().to(wide)
    finite = right.abs().nan_to_num(0.0, 0.0, 0.0)
    largest = finite.max().item() if right.numel() else 0.0
    allowed = tolerance * max(largest, SMALLEST)
    wrong = ~torch.isclose(given, right, rtol=0.0, atol=allowed, equal_nan=True)
    if not wrong.any():
        return None
    return (given - right)[wrong].abs().nan_to_num(math.inf).max().item(), allowed, largest


def same_values(one: object, other: object) -> bool:
    """Whether two results are equal, tensors up to the tolerance of their dtype.

    Example:
        >>> same_values(torch.ones(2), torch.ones(2) + 1e-5)
        True
    """
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return type(one) is type(other) and bool(one == other)
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    tolerance = tolerance_of(one.dtype)
    return apart(one, other, tolerance) is None if tolerance else torch.equal(one, other)
