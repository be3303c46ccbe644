"""Example calls of a model of transformers, from its forward's parameters and its config.

It knows arguments by name, and no family; whether a call runs is for the caller to try.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from piecework.integrations.protocol import Call, first_line

SEED = 11
TOKENS = 12
VOCABULARY = 99  # larger ones are not used up
_ROWS = 16  # the most of a call


@dataclass(frozen=True, slots=True)
class Size:
    """How large a call is; sound is longer with more tokens, images are of one size."""

    rows: int  # at most 16
    tokens: int = TOKENS
    padding: Literal["left", "right", "none"] = "right"  # where the mask hides tokens


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
    parameters = inspect.signature(model.forward).parameters
    required = [
        name
        for name, each in parameters.items()
        if each.default is inspect.Parameter.empty and each.kind is each.POSITIONAL_OR_KEYWORD
    ]
    main = getattr(model, "main_input_name", "input_ids")
    known = [name for name in _MAIN if name in parameters]
    for image, sound in ((None, 2000), (64, 400), (224, 16000), (None, 3000), (512, 128)):
        for wanted in ([main, *required], known):
            chosen = list(wanted)
            if "input_ids" in chosen and "attention_mask" in parameters:
                chosen.append("attention_mask")
            pair = getattr(model.config, "is_encoder_decoder", False)
            if pair and "decoder_input_ids" in parameters:
                chosen.append("decoder_input_ids")
            if all(hasattr(_Arguments, name) for name in chosen):
                make = partial(_Arguments, model.config, image, sound)
                yield partial(named_arguments, make, list(dict.fromkeys(chosen)))


_MAIN = ("input_ids", "pixel_values", "bbox", "input_features", "input_values")


def named_arguments(make: Callable[[Size], object], names: Sequence[str], size: Size) -> Call:
    """The call of a size by keyword arguments, each made by what ``make`` has of its name."""
    made = make(size)
    return (), {name: getattr(made, name)() for name in names}


class _Arguments:
    """Makes each argument by its name; fewer rows are the first of more."""

    def __init__(self, config: Any, image: int | None, sound: int, size: Size) -> None:
        self._config, self._size = config, size
        self._text = getattr(config, "text_config", config)
        self._vision = getattr(config, "vision_config", config)
        self._audio = getattr(config, "audio_config", config)
        side = getattr(self._vision, "image_size", None) or 32
        if isinstance(side, dict):
            side = side.get("height", side.get("shortest_edge", 32))
        self._image = image or int(side[0] if isinstance(side, (list, tuple)) else side)
        self._sound = sound * max(1, size.tokens // TOKENS)

    def _number(self, name: str, default: int) -> int:
        return int(getattr(self._config, name, None) or default)

    def _drawn(self, *shape: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(SEED)
        return torch.randn(_ROWS, *shape, generator=generator)[: self._size.rows]

    def _tokens(self, length: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(SEED)
        most = min(VOCABULARY, int(getattr(self._text, "vocab_size", None) or VOCABULARY))
        return torch.randint(3, most, (_ROWS, length), generator=generator)[: self._size.rows]

    def input_ids(self) -> torch.Tensor:
        return self._tokens(self._size.tokens)

    inputs = input_ids

    def decoder_input_ids(self) -> torch.Tensor:
        return self._tokens(self._size.tokens // 2)

    def attention_mask(self) -> torch.Tensor:
        return padding_mask(self._size)

    def bbox(self) -> torch.Tensor:
        most = min(100, self._number("max_2d_position_embeddings", 100))
        corner = self._tokens(self._size.tokens * 2).unflatten(1, (-1, 2)) % (most // 2)
        return torch.cat([corner, corner + most // 3], dim=-1)

    def pixel_values(self) -> torch.Tensor:
        channels = int(getattr(self._vision, "num_channels", None) or 3)
        frames = self._number("num_frames", 0) or self._number("frames_per_clip", 0)
        return self._drawn(*[frames] * bool(frames), channels, self._image, self._image)

    def pixel_values_videos(self) -> torch.Tensor:
        return self._drawn(self._number("frames_per_clip", 4), 3, self._image, self._image)

    def pixel_mask(self) -> torch.Tensor:
        return torch.ones(self._size.rows, self._image, self._image, dtype=torch.long)

    def input_values(self) -> torch.Tensor:
        bins = self._number("num_mel_bins", 0)
        if bins and hasattr(self._config, "max_length"):
            return self._drawn(int(self._config.max_length), bins)
        return self._drawn(self._sound)

    def input_features(self) -> torch.Tensor:
        named = ("num_mel_bins", "input_feat_per_channel")
        bins = next((int(n) for each in named if (n := getattr(self._audio, each, 0))), 80)
        if getattr(self._config, "model_type", "") and hasattr(self._audio, "max_source_positions"):
            return self._drawn(bins, 2 * int(self._audio.max_source_positions))
        return self._drawn(self._sound // 10, bins)

    def past_values(self) -> torch.Tensor:
        lags = max(getattr(self._config, "lags_sequence", None) or [0])
        length = self._number("context_length", 32) + lags
        channels = self._number("num_input_channels", 0)
        return self._drawn(length, channels) if channels else self._drawn(length)

    def past_time_features(self) -> torch.Tensor:
        width = int(getattr(self._config, "num_time_features", 0))
        return self._drawn(self.past_values().shape[1], width)

    def past_observed_mask(self) -> torch.Tensor:
        return torch.ones_like(self.past_values())

    def visual_embeds(self) -> torch.Tensor:
        return self._drawn(5, self._number("visual_embedding_dim", 32))

    def visual_feats(self) -> torch.Tensor:
        return self._drawn(5, self._number("visual_feat_dim", 32))

    def visual_pos(self) -> torch.Tensor:
        return self._drawn(5, self._number("visual_pos_dim", 4))
