"""The few tokens that a model is tried on: in, a decoder; out, the tokens, the distance of two results, and refusals for errors.

It never decides what a model is fit for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers.configuration_utils import PreTrainedConfig

from piecework.errors import CaptureError, InputError

#: A decoder's own forward, bound.
Forward = Callable[..., object]

# How far the flattened forward may be from the model's own, as the norm of the difference over the norm. Both run the
# same kernels on the same numbers of rows, so this is room for another summation order and for little else.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}

# The probe's rows have three tokens, so a window of two cuts one off.
_PROBE_WINDOW = 2

# What a foreign model may raise when it is run in a way that it was not written for.
_MODEL_ERRORS = (RuntimeError, ValueError, TypeError, LookupError, AttributeError)


def probe_tokens(decoder: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows of three tokens, the first padded on the left: ids and attention mask, both [2, 3]."""
    embedding = embedding_of(decoder)
    ids = (torch.arange(1, 7, device=embedding.device) * 11) % embedding.shape[0]
    mask = torch.ones(2, 3, dtype=torch.long, device=embedding.device)
    mask[0, 0] = 0
    return ids.view(2, 3), mask


def embedding_of(decoder: nn.Module) -> torch.Tensor:
    """The weight of the token embedding; where it is, the decoder takes its inputs."""
    return decoder.get_input_embeddings().weight


def one_more(mask: torch.Tensor) -> torch.Tensor:
    """The attention mask of the next token: one more column, attended."""
    return torch.cat([mask, mask.new_ones(mask.shape[0], 1)], dim=1)


def distance(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference over the norm of ``expected``, which must be finite."""
    require_finite(expected)
    expected = expected.double()
    return float((got.double() - expected).norm() / expected.norm().clamp_min(1e-30))


def require_finite(hidden: torch.Tensor) -> None:
    if not bool(hidden.isfinite().all()):
        raise CaptureError(
            "the model's own forward gives infinite or undefined values on a few tokens, so nothing can be compared",
            hint="load or initialise its weights before stitching",
        )


def tolerance(hidden: torch.Tensor) -> float:
    """The largest distance at which two results of this dtype count as equal."""
    return _TOLERANCE.get(hidden.dtype, 1e-2)


@contextmanager
def as_refusal(decoder: nn.Module, how: str) -> Iterator[None]:
    """Turn what a model raises on the probe into a refusal; piecework's own errors pass."""
    try:
        yield
    except InputError as error:
        raise CaptureError(
            error.message, where=error.where, hint="leave this model unstitched"
        ) from error
    except _MODEL_ERRORS as error:
        raise CaptureError(
            f"run {how} on a few tokens it raises {type(error).__name__}: {error}",
            where=type(decoder).__name__,
            hint="leave this model unstitched",
        ) from error


@contextmanager
def narrow_windows(decoder: nn.Module) -> Iterator[None]:
    """Shrink attention windows below the probe's length for the block, so that windowed masks differ from full ones."""
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


def field_of(config: PreTrainedConfig, name: str) -> object:
    """A field of ``config``, None where it has none or where it differs from layer to layer."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # raised for a field of the layers that is asked of the whole
        return None


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether a model, or the decoder in it, reads an encoder's states."""
    return bool(getattr(model.config, "is_encoder_decoder", False))
