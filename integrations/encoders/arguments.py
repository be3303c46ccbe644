"""Example calls of a model of transformers, from its forward's parameters and its config.

It knows arguments by name, and no family; whether a call runs is for the caller to try.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from piecework.integrations.protocol import Call, first_line

SEED = 11
TOKENS = 12
VOCABULARY = 99  # larger ones are not used up
_ROWS = 16  # the most of a call


@dataclass(frozen=True, slots=True)
class Size:
    """How large a call is.

    Attributes:
        rows: at most 16.
        tokens: of a row; sound is longer with them, images are of one size.
        padding: where the mask hides tokens; "none" for a mask of ones.
    """

    rows: int
    tokens: int = TOKENS
    padding: Literal["left", "right", "none"] = "right"


Ways = Callable[[Size], Call]

#: Calls that a compiled model has to answer as eager does; the first is the example.
SIZES = (
    Size(4),
    Size(1, TOKENS, "none"),
    Size(2, 7, "left"),
    Size(5, 2 * TOKENS, "none"),
    Size(3, 2 * TOKENS, "right"),
)


def example(ways: Ways) -> Call:
    """The call to trace with; of images alone the rows are dynamic, or torch takes minutes."""
    args, kwargs = ways(SIZES[0])
    if all(name.startswith("pixel_") for name in kwargs):
        for value in kwargs.values():
            torch._dynamo.mark_dynamic(value, 0)
    return args, kwargs


def padding_mask(size: Size) -> torch.Tensor:
    """Ones where there are tokens, ``[rows, tokens]``; rows are up to two tokens shorter than that."""
    hidden = (2 - torch.arange(size.rows) % 3) * (size.padding != "none")
    mask = (torch.arange(size.tokens)[None] < size.tokens - hidden[:, None]).long()
    return mask.flip(1) if size.padding == "left" else mask


@torch.no_grad()
def first_that_runs(model: torch.nn.Module, ways: Iterable[Ways]) -> Ways:
    """The first of ``ways`` to call ``model`` that runs.

    Raises:
        ValueError: none does; the message has the last reason.
    """
    reason = "no arguments known"
    for arguments in ways:
        try:
            args, kwargs = arguments(SIZES[0])
            model(*args, **kwargs)
            return arguments
        except Exception as error:  # noqa: BLE001 - arguments that this model doesn't take
            reason = f"{type(error).__name__}: {first_line(error)}"
    raise ValueError(reason)


def candidates(model: torch.nn.Module) -> Iterator[Ways]:
    """Ways to call ``model``: with images of several sizes, or sound of several lengths."""
    names = list(inspect.signature(model.forward).parameters)
    required = [
        name
        for name, each in inspect.signature(model.forward).parameters.items()
        if each.default is inspect.Parameter.empty and each.kind is each.POSITIONAL_OR_KEYWORD
    ]
    main = getattr(model, "main_input_name", "input_ids")
    for image, sound in ((None, 2000), (64, 400), (224, 16000), (None, 3000), (512, 128)):
        for wanted in ([main, *required], _known(names)):
            chosen = _completed(wanted, names, model.config)
            if all(hasattr(_Arguments, name) for name in chosen):
                yield _way(chosen, model.config, image, sound)


def _way(names: Sequence[str], config: Any, image: int | None, sound: int) -> Ways:
    def arguments(size: Size) -> Call:
        make = _Arguments(config, image, sound, size)
        return (), {name: getattr(make, name)(size.rows) for name in names}

    return arguments


def _known(names: Sequence[str]) -> list[str]:
    return [
        name
        for name in ("input_ids", "pixel_values", "bbox", "input_features", "input_values")
        if name in names
    ]


def _completed(wanted: Sequence[str], names: Sequence[str], config: Any) -> list[str]:
    """``wanted`` with what belongs to it: a mask to tokens, tokens for a decoder."""
    more = list(dict.fromkeys(wanted))
    if "input_ids" in more and "attention_mask" in names:
        more.append("attention_mask")
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in names:
        more.append("decoder_input_ids")
    return list(dict.fromkeys(more))


class _Arguments:
    """Makes each argument by its name, with ``n`` rows; fewer rows are the first of more."""

    def __init__(self, config: Any, image: int | None, sound: int, size: Size) -> None:
        self._text = getattr(config, "text_config", config)
        self._vision = getattr(config, "vision_config", config)
        self._audio = getattr(config, "audio_config", config)
        self._image = image or _side(getattr(self._vision, "image_size", 32) or 32)
        self._sound = sound * max(1, size.tokens // TOKENS)
        self._size, self._length = size, size.tokens
        self._config = config

    def _drawn(self, n: int, *shape: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(SEED)
        return torch.randn(_ROWS, *shape, generator=generator)[:n]

    def _tokens(self, n: int, length: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(SEED)
        most = min(VOCABULARY, int(getattr(self._text, "vocab_size", VOCABULARY) or VOCABULARY))
        return torch.randint(3, most, (_ROWS, length), generator=generator)[:n]

    def input_ids(self, n: int) -> torch.Tensor:
        return self._tokens(n, self._length)

    def decoder_input_ids(self, n: int) -> torch.Tensor:
        return self._tokens(n, self._length // 2)

    def attention_mask(self, n: int) -> torch.Tensor:
        return padding_mask(self._size)

    def bbox(self, n: int) -> torch.Tensor:
        most = min(100, int(getattr(self._config, "max_2d_position_embeddings", 100)))
        corner = self._tokens(n, self._length * 2).view(n, self._length, 2) % (most // 2)
        return torch.cat([corner, corner + most // 3], dim=-1)

    def pixel_values(self, n: int) -> torch.Tensor:
        channels = int(getattr(self._vision, "num_channels", 3) or 3)
        frames = getattr(self._config, "num_frames", None) or getattr(
            self._config, "frames_per_clip", None
        )
        shape = (channels, self._image, self._image)
        return self._drawn(n, int(frames), *shape) if frames else self._drawn(n, *shape)

    def pixel_values_videos(self, n: int) -> torch.Tensor:
        frames = int(getattr(self._config, "frames_per_clip", 4))
        return self._drawn(n, frames, 3, self._image, self._image)

    def pixel_mask(self, n: int) -> torch.Tensor:
        return torch.ones(n, self._image, self._image, dtype=torch.long)

    def input_values(self, n: int) -> torch.Tensor:
        bins = getattr(self._config, "num_mel_bins", None)
        if bins and hasattr(self._config, "max_length"):
            return self._drawn(n, int(self._config.max_length), int(bins))
        return self._drawn(n, self._sound)

    def input_features(self, n: int) -> torch.Tensor:
        bins = int(
            getattr(self._audio, "num_mel_bins", 0)
            or getattr(self._audio, "input_feat_per_channel", 0)
            or 80
        )
        if getattr(self._config, "model_type", "") and hasattr(self._audio, "max_source_positions"):
            return self._drawn(n, bins, 2 * int(self._audio.max_source_positions))
        return self._drawn(n, self._sound // 10, bins)

    def past_values(self, n: int) -> torch.Tensor:
        length = int(getattr(self._config, "context_length", 32))
        channels = int(getattr(self._config, "num_input_channels", 0) or 0)
        lags = max(getattr(self._config, "lags_sequence", [0]) or [0])
        return (
            self._drawn(n, length + lags, channels) if channels else self._drawn(n, length + lags)
        )

    def past_time_features(self, n: int) -> torch.Tensor:
        width = int(getattr(self._config, "num_time_features", 0))
        return self._drawn(n, self.past_values(1).shape[1], width)

    def past_observed_mask(self, n: int) -> torch.Tensor:
        return torch.ones_like(self.past_values(n))

    def visual_embeds(self, n: int) -> torch.Tensor:
        return self._drawn(n, 5, int(getattr(self._config, "visual_embedding_dim", 32)))

    def visual_feats(self, n: int) -> torch.Tensor:
        return self._drawn(n, 5, int(getattr(self._config, "visual_feat_dim", 32)))

    def visual_pos(self, n: int) -> torch.Tensor:
        return self._drawn(n, 5, int(getattr(self._config, "visual_pos_dim", 4)))

    def inputs(self, n: int) -> torch.Tensor:
        return self._tokens(n, self._length)


def _side(size: Any) -> int:
    if isinstance(size, dict):
        size = size.get("height", size.get("shortest_edge", 32))
    return int(size[0] if isinstance(size, (list, tuple)) else size)
