"""Families of transformers. In: the registries of its auto classes. Out: a row per family whose small model runs, with arguments made from its forward's signature.

Decoders of text are left out: `piecework.integrations.transformers` serves those with their caches.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from piecework.bench.lists.sample import Call, Row, Sample
from piecework.bench.lists.shrink import LEVELS, VOCABULARY, shrink

SEED = 11
LARGEST = 60_000_000  # parameters
TOKENS = 12

#: Kind → the registries of transformers that tell it, by name; a family counts for the first one that has it.
KINDS = {
    "multi-modal": (
        "ZERO_SHOT_IMAGE_CLASSIFICATION",
        "VISUAL_QUESTION_ANSWERING",
        "DOCUMENT_QUESTION_ANSWERING",
        "ZERO_SHOT_OBJECT_DETECTION",
    ),
    "vision": (
        "IMAGE_CLASSIFICATION",
        "OBJECT_DETECTION",
        "SEMANTIC_SEGMENTATION",
        "UNIVERSAL_SEGMENTATION",
        "DEPTH_ESTIMATION",
        "MASKED_IMAGE_MODELING",
        "VIDEO_CLASSIFICATION",
        "IMAGE_TO_IMAGE",
        "IMAGE",
    ),
    "audio": ("AUDIO_CLASSIFICATION", "CTC", "SPEECH_SEQ_2_SEQ", "AUDIO_XVECTOR"),
    "time series": ("TIME_SERIES_PREDICTION", "TIME_SERIES_CLASSIFICATION"),
    "text": ("MASKED_LM", "TEXT_ENCODING", "SEQ_TO_SEQ_CAUSAL_LM"),
}


def families() -> list[Row]:
    """A row per family in `KINDS`.

    Raises:
        ImportError: transformers is not installed.
    """
    from transformers.models.auto import modeling_auto

    found: dict[str, str] = {}
    for kind, tasks in KINDS.items():
        for task in tasks:
            for family in getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES", ()):
                if family in modeling_auto.MODEL_MAPPING_NAMES:
                    found.setdefault(family, kind)
    return [Row("transformers", name, _samples_of(name), kind) for name, kind in found.items()]


def _samples_of(family: str) -> Callable[[int], Sequence[Sample]]:
    def samples(_: int) -> Sequence[Sample]:
        model, arguments = build(family)
        return [Sample("", lambda: copy.deepcopy(model), arguments)]

    return samples


def build(family: str) -> tuple[torch.nn.Module, Callable[[int], Call]]:
    """A small model of ``family`` with seeded weights, and arguments by batch size.

    Raises:
        ValueError: no small config with these arguments runs; the message has the last reason.
    """
    reason: object = "no arguments known"
    for level in range(len(LEVELS)):
        with quiet():
            try:
                model = _model(family, level)
            except Exception as error:  # noqa: BLE001 - a config that doesn't fit its model
                reason = error
                continue
            for arguments in _candidates(model):
                try:
                    args, kwargs = arguments(4)
                    with torch.no_grad():
                        model(*args, **kwargs)
                    return model, arguments
                except Exception as error:  # noqa: BLE001 - arguments that this model doesn't take
                    reason = error
    raise ValueError(
        f"{type(reason).__name__}: {str(reason).strip().splitlines()[0][:120] if str(reason) else ''}"
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from printing reports."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def _model(family: str, level: int) -> torch.nn.Module:
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.for_model(family)
    shrink(config, level)
    for each in (config, getattr(config, "text_config", None), getattr(config, "decoder", None)):
        if hasattr(each, "use_cache"):
            each.use_cache = False
    with torch.device("meta"):
        size = sum(each.numel() for each in AutoModel.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size / 1e6:.0f} million parameters")
    torch.manual_seed(SEED)
    model = AutoModel.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.is_floating_point():
                noise = torch.randn(weight.shape, generator=generator)
                weight.add_(noise * 0.02)
    return model


# --- arguments -------------------------------------------------------------------------------------


def _candidates(model: torch.nn.Module) -> Iterator[Callable[[int], Call]]:
    """Ways to call ``model``, from its forward's parameters: with images of several sizes, or sound of several lengths."""
    names = list(inspect.signature(model.forward).parameters)
    required = [
        name
        for name, each in inspect.signature(model.forward).parameters.items()
        if each.default is inspect.Parameter.empty and each.kind is each.POSITIONAL_OR_KEYWORD
    ]
    main = getattr(model, "main_input_name", "input_ids")
    for image, sound in ((None, 2000), (64, 400), (224, 16000), (None, 3000), (512, 128)):
        make = _Arguments(model.config, image, sound)
        for wanted in ([main, *required], _known(names)):
            if all(hasattr(make, name) for name in wanted):
                yield make.call(_completed(wanted, names, model.config))


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
    return more


class _Arguments:
    """Makes each argument by its name, with ``n`` rows, equal at each call; a call of ``n`` has the first ``n`` rows of a larger one's."""

    def __init__(self, config: Any, image: int | None, sound: int) -> None:
        self._text = getattr(config, "text_config", config)
        self._vision = getattr(config, "vision_config", config)
        self._audio = getattr(config, "audio_config", config)
        self._image = image or _side(getattr(self._vision, "image_size", 32) or 32)
        self._sound = sound
        self._config = config

    def call(self, names: Sequence[str]) -> Callable[[int], Call]:
        def arguments(n: int) -> Call:
            return (), {name: getattr(self, name)(n) for name in dict.fromkeys(names)}

        return arguments

    def _drawn(self, n: int, *shape: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(SEED)
        return torch.randn(16, *shape, generator=generator)[:n]

    def _tokens(self, n: int, length: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(SEED)
        most = min(VOCABULARY, int(getattr(self._text, "vocab_size", VOCABULARY) or VOCABULARY))
        return torch.randint(3, most, (16, length), generator=generator)[:n]

    def input_ids(self, n: int) -> torch.Tensor:
        return self._tokens(n, TOKENS)

    def decoder_input_ids(self, n: int) -> torch.Tensor:
        return self._tokens(n, TOKENS // 2)

    def attention_mask(self, n: int) -> torch.Tensor:
        lengths = torch.arange(16) % 3 + TOKENS - 2
        return (torch.arange(TOKENS)[None] < lengths[:, None]).long()[:n]

    def bbox(self, n: int) -> torch.Tensor:
        most = min(100, int(getattr(self._config, "max_2d_position_embeddings", 100)))
        corner = self._tokens(n, TOKENS * 2).view(n, TOKENS, 2) % (most // 2)
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
        return self._tokens(n, TOKENS)


def _side(size: Any) -> int:
    if isinstance(size, dict):
        size = size.get("height", size.get("shortest_edge", 32))
    return int(size[0] if isinstance(size, (list, tuple)) else size)
