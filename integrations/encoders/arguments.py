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
    """Ones where there are tokens, ``[rows, tokens]``; up to two are hidden in a row."""
    hidden = (2 - torch.arange(size.rows) % 3) * (size.padding != "none")
    mask = (torch.arange(size.tokens)[None] < size.tokens - hidden[:, None]).long()
    return mask.flip(1) if size.padding == "left" else mask


@torch.no_grad()
def first_that_runs(model: torch.nn.Module, ways: Iterable[Ways]) -> Ways:
    """The first of ``ways`` to call ``model`` that runs; else a `ValueError`."""
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
            if all(name in ARGUMENTS for name in chosen):
                yield partial(_call, model.config, image, sound, list(dict.fromkeys(chosen)))


_MAIN = ("input_ids", "pixel_values", "bbox", "input_features", "input_values")


def _call(config: Any, image: int | None, sound: int, names: Sequence[str], size: Size) -> Call:
    """The call of a size, by keyword."""
    made = _Sizes(config, image, sound, size)
    return (), {name: ARGUMENTS[name](made) for name in names}


class _Sizes:
    """How large arguments are; fewer rows are the first of more."""

    def __init__(self, config: Any, image: int | None, sound: int, size: Size) -> None:
        self.config, self.rows, self.tokens, self.size = config, size.rows, size.tokens, size
        self.vision = getattr(config, "vision_config", config)
        self.audio = getattr(config, "audio_config", config)
        text = getattr(config, "text_config", config)
        self._most = min(VOCABULARY, int(getattr(text, "vocab_size", None) or VOCABULARY))
        side = getattr(self.vision, "image_size", None) or 32
        if isinstance(side, dict):
            side = side.get("height", side.get("shortest_edge", 32))
        side = image or int(side[0] if isinstance(side, (list, tuple)) else side)
        self.image = (side, side)
        self.sound = sound * max(1, size.tokens // TOKENS)

    def number(self, name: str, default: int) -> int:
        return int(getattr(self.config, name, None) or default)

    def drawn(self, *shape: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(SEED)
        return torch.randn(_ROWS, *shape, generator=generator)[: self.rows]

    def ids(self, length: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(SEED)
        return torch.randint(3, self._most, (_ROWS, length), generator=generator)[: self.rows]


def _bbox(of: _Sizes) -> torch.Tensor:
    most = min(100, of.number("max_2d_position_embeddings", 100))
    corner = of.ids(of.tokens * 2).unflatten(1, (-1, 2)) % (most // 2)
    return torch.cat([corner, corner + most // 3], dim=-1)


def _pixel_values(of: _Sizes) -> torch.Tensor:
    channels = int(getattr(of.vision, "num_channels", None) or 3)
    frames = of.number("num_frames", 0) or of.number("frames_per_clip", 0)
    return of.drawn(*[frames] * bool(frames), channels, *of.image)


def _input_values(of: _Sizes) -> torch.Tensor:
    bins = of.number("num_mel_bins", 0)
    if bins and hasattr(of.config, "max_length"):
        return of.drawn(int(of.config.max_length), bins)
    return of.drawn(of.sound)


def _input_features(of: _Sizes) -> torch.Tensor:
    named = ("num_mel_bins", "input_feat_per_channel")
    bins = next((int(n) for each in named if (n := getattr(of.audio, each, 0))), 80)
    if getattr(of.config, "model_type", "") and hasattr(of.audio, "max_source_positions"):
        return of.drawn(bins, 2 * int(of.audio.max_source_positions))
    return of.drawn(of.sound // 10, bins)


def _past_values(of: _Sizes) -> torch.Tensor:
    lags = max(getattr(of.config, "lags_sequence", None) or [0])
    channels = of.number("num_input_channels", 0)
    return of.drawn(of.number("context_length", 32) + lags, *[channels] * bool(channels))


def _past_time_features(of: _Sizes) -> torch.Tensor:
    return of.drawn(_past_values(of).shape[1], int(getattr(of.config, "num_time_features", 0)))


#: How each argument that is known is made.
ARGUMENTS: dict[str, Callable[[_Sizes], torch.Tensor]] = {
    "input_ids": lambda of: of.ids(of.tokens),
    "inputs": lambda of: of.ids(of.tokens),
    "decoder_input_ids": lambda of: of.ids(of.tokens // 2),
    "attention_mask": lambda of: padding_mask(of.size),
    "bbox": _bbox,
    "pixel_values": _pixel_values,
    "pixel_values_videos": lambda of: of.drawn(of.number("frames_per_clip", 4), 3, *of.image),
    "pixel_mask": lambda of: torch.ones(of.rows, *of.image, dtype=torch.long),
    "input_values": _input_values,
    "input_features": _input_features,
    "past_values": _past_values,
    "past_time_features": _past_time_features,
    "past_observed_mask": lambda of: torch.ones_like(_past_values(of)),
    "visual_embeds": lambda of: of.drawn(5, of.number("visual_embedding_dim", 32)),
    "visual_feats": lambda of: of.drawn(5, of.number("visual_feat_dim", 32)),
    "visual_pos": lambda of: of.drawn(5, of.number("visual_pos_dim", 4)),
}
