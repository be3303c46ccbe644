"""The few tokens that a model is tried on, and whether two results on them are the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils import _pytree as pytree
from transformers.cache_utils import Cache

from piecework.closeness import tolerance_of
from piecework.errors import CaptureError, InputError
from piecework.integrations.transformers.settings import embedding_of, field_of

#: A decoder's own forward, bound.
Forward = Callable[..., object]
HINT = "leave this model unstitched"

# The probe's rows have three tokens, so a window of two cuts one off.
_PROBE_WINDOW = 2

#: What a foreign model may raise when it is run in a way that it was not written for.
MODEL_ERRORS = (RuntimeError, ValueError, TypeError, LookupError, AttributeError)


def probe_tokens(decoder: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask of two rows of three tokens, the first padded on the left."""
    embedding = embedding_of(decoder)
    ids = (torch.arange(1, 7, device=embedding.device) * 11) % embedding.shape[0]
    mask = torch.ones(2, 3, dtype=torch.long, device=embedding.device)
    mask[0, 0] = 0
    return ids.view(2, 3), mask


def require_finite(hidden: torch.Tensor) -> None:
    if not bool(hidden.isfinite().all()):
        raise CaptureError(
            "the model's own forward gives infinite or undefined values on a few tokens, so nothing can be compared",
            hint="load or initialise its weights before stitching",
        )


def distance(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference over that of ``expected``; infinite where one is undefined."""
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


def limit_of(dtype: torch.dtype, *, compiled: bool = False) -> float:
    """The largest `distance` of equal results; a fifth of the tolerance for the same kernels."""
    return tolerance_of(dtype) if compiled else tolerance_of(dtype) / 5


def require_same(
    got: Mapping[str, object], expected: Mapping[str, object], *, compiled: bool
) -> None:
    """Raise `CaptureError` where outputs, or what two caches hold, differ in form or value."""
    if got.keys() != expected.keys():
        why = f"it gives {', '.join(sorted(got))}; its own forward {', '.join(sorted(expected))}"
        raise CaptureError(why, hint=HINT)
    for name, value in expected.items():
        if isinstance(value, Cache) or isinstance(got[name], Cache):
            continue
        ours, theirs = pytree.tree_leaves(got[name]), pytree.tree_leaves(value)
        why = "" if len(ours) == len(theirs) else "has another structure than the model's own"
        for mine, their in zip(ours, theirs, strict=False):
            why = why or _difference(mine, their, compiled)
        if why:
            raise CaptureError(f"compiled whole, its {name} {why}", hint=HINT)


def _difference(got: object, expected: object, compiled: bool) -> str:
    if not (isinstance(expected, torch.Tensor) and isinstance(got, torch.Tensor)):
        same = type(got) is type(expected) and got == expected
        return "" if same else f"is {got!r}; its own is {expected!r}"
    if (got.shape, got.dtype, got.device) != (expected.shape, expected.dtype, expected.device):
        ours, theirs = (f"{tuple(each.shape)} of {each.dtype}" for each in (got, expected))
        return f"is {ours}; its own is {theirs}"
    apart = distance(got, expected)
    if apart <= limit_of(expected.dtype, compiled=compiled):
        return ""
    return f"differs from the model's own by {apart:.1e} of its norm"


@contextmanager
def as_refusal(decoder: nn.Module, how: str) -> Iterator[None]:
    """Turn what a model raises on the probe into a refusal."""
    try:
        yield
    except InputError as error:
        raise CaptureError(error.message, where=error.where, hint=HINT) from error
    except MODEL_ERRORS as error:
        why = f"run {how} on a few tokens it raises {type(error).__name__}: {error}"
        raise CaptureError(why, where=type(decoder).__name__, hint=HINT) from error


@contextmanager
def narrow_windows(decoder: nn.Module) -> Iterator[None]:
    """Shrink attention windows below the probe's length for the block."""
    config = decoder.config.get_text_config()
    wide = {
        name: value
        for name in ("sliding_window", "attention_chunk_size")
        if isinstance(value := field_of(config, name), int) and value > _PROBE_WINDOW
    }
    try:
        for name in wide:
            setattr(config, name, _PROBE_WINDOW)
        yield
    finally:
        for name, value in wide.items():
            setattr(config, name, value)
