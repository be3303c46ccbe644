"""Whether two forwards of a decoder are the same. In: the output and the cache of each. Out: nothing, or a refusal that names the first difference.

It runs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Set

import torch
from torch.utils import _pytree as pytree
from transformers.cache_utils import Cache

from piecework.errors import CaptureError
from piecework.integrations.transformers.own.cache_state import take_apart
from piecework.integrations.transformers.own.probe import tolerance

# As `tolerance`, for what a compiler made: it leaves out roundings and sums in other orders.
_COMPILED = {torch.float64: 1e-8, torch.float32: 5e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
_HINT = "leave this model unstitched"


def require_same_output(
    got: Mapping[str, object], expected: Mapping[str, object], *, compiled: bool
) -> None:
    """Compare all fields but caches.

    Args:
        compiled: whether ``got`` was computed by compiled code.

    Raises:
        CaptureError: a field is missing or differs.
    """
    if got.keys() != expected.keys():
        raise CaptureError(
            f"compiled whole, its forward returns {', '.join(sorted(got))}; its own returns {', '.join(sorted(expected))}",
            hint=_HINT,
        )
    for name, value in expected.items():
        if isinstance(value, Cache) or isinstance(got[name], Cache):
            continue
        ours, theirs = pytree.tree_leaves(got[name]), pytree.tree_leaves(value)
        if len(ours) != len(theirs):
            raise CaptureError(f"compiled whole, its {name} has another structure", hint=_HINT)
        for mine, their in zip(ours, theirs, strict=True):
            _require_same(name, mine, their, compiled)


def require_same_cache(got: Cache, expected: Cache, counts: Set[str], *, compiled: bool) -> None:
    """Compare what two caches hold.

    Raises:
        CaptureError: they differ.
        InputError: one holds what can't be taken apart.
    """
    ours, theirs = take_apart(got, counts), take_apart(expected, counts)
    if ours.form != theirs.form:
        raise CaptureError("compiled whole, it leaves a cache of another form", hint=_HINT)
    for mine, their in zip(ours.leaves, theirs.leaves, strict=True):
        _require_same("cache", mine, their, compiled)


def _require_same(name: str, got: object, expected: object, compiled: bool) -> None:
    if not isinstance(expected, torch.Tensor) or not isinstance(got, torch.Tensor):
        if type(got) is not type(expected) or got != expected:
            raise CaptureError(
                f"compiled whole, its {name} is {got!r}; its own is {expected!r}", hint=_HINT
            )
        return
    if got.shape != expected.shape or got.dtype != expected.dtype or got.device != expected.device:
        raise CaptureError(
            f"compiled whole, its {name} is {tuple(got.shape)} of {got.dtype}; its own is {tuple(expected.shape)} of {expected.dtype}",
            hint=_HINT,
        )
    apart = _distance(got, expected)
    limit = _COMPILED.get(expected.dtype, 5e-2) if compiled else tolerance(expected)
    if apart > limit:
        raise CaptureError(
            f"compiled whole, its {name} differs from the model's own by {apart:.1e} of its norm",
            hint=_HINT,
        )


def _distance(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference over the norm of ``expected``; infinite where one is undefined and the other is not."""
    if not expected.is_floating_point():
        return 0.0 if torch.equal(got, expected) else float("inf")
    both = expected.isfinite() & got.isfinite()
    same = (got == expected) | (got.isnan() & expected.isnan())
    if not bool((both | same).all()):
        return float("inf")
    zero = expected.new_zeros((), dtype=torch.double)
    want = torch.where(both, expected.double(), zero)
    apart = torch.where(both, got.double() - expected.double(), zero).norm()
    return float(apart / want.norm().clamp_min(1e-6))
