"""Models of transformers that are called once, for the command line: text, vision, audio, encoders.

Nothing is downloaded; random weights and example arguments are seeded.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from piecework.errors import UsageError
from piecework.integrations.encoders.arguments import (
    SIZES,
    Ways,
    candidates,
    example,
    first_that_runs,
)
from piecework.integrations.protocol import (
    Call,
    LoadedModel,
    add_noise,
    config_in,
    first_line,
    model_of,
    require_packages,
)

_WITH_ENCODER = ("SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "TEXT_TO_WAVEFORM")
_GENERATORS = ("IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", *_WITH_ENCODER)


def load(path: Path, seed: int) -> LoadedModel | None:
    """The model of a folder or ``config.json``; None for a causal LM, or none of transformers."""
    file, fields = config_in(path)
    if not isinstance(fields.get("model_type"), str):
        return None
    require_packages(("transformers",), "transformers")
    import transformers

    transformers.logging.set_verbosity_error()
    try:
        config = transformers.AutoConfig.for_model(**fields)
    except Exception as error:  # fields are checked by each config in its own way
        raise UsageError(
            f"{str(file)!r} is no model config of transformers {transformers.__version__}: {first_line(error)}",
            hint="it must be the config.json of a transformers model, with its model_type",
        ) from error
    if not is_encoder(config, fields.get("architectures") or (), str(file)):
        return None
    without_caches(config)
    kind = transformers.AutoModel

    def make() -> torch.nn.Module:
        return add_noise(kind.from_config(config, dtype=torch.float32), seed)

    model = called_part(model_of(kind, path, seed, make, config=config))
    calls = example_calls(model, file, candidates(model))
    return LoadedModel.of_calls(model, calls, file.read_text())


def called_part(model: torch.nn.Module) -> torch.nn.Module:
    """What of a model is called once: the encoder of one that generates, else the whole."""
    return model.get_encoder() if _has_decoder(model.config) else model  # type: ignore[operator,no-any-return]


def without_caches(config: Any) -> None:
    """Keep a model, and the decoder in it, from returning a cache."""
    for each in (config, getattr(config, "text_config", None), getattr(config, "decoder", None)):
        if each is not None and hasattr(each, "use_cache"):
            each.use_cache = False


def example_calls(model: torch.nn.Module, file: Path, candidates: Iterable[Ways]) -> list[Call]:
    """The call to trace with, and others; `UsageError` where the arguments are not known here."""
    try:
        ways = first_that_runs(model, candidates)
    except ValueError as error:
        why = f"no arguments are known that a {type(model).__name__} takes: {error}"
        hint = "use a factory: module:factory that returns (module, example_inputs)"
        raise UsageError(why, where=str(file), hint=hint) from error
    others = (ways(size) for size in SIZES[1:])
    return [example(ways), *(each for each in others if _runs(model, each))]


@torch.no_grad()
def _runs(model: torch.nn.Module, call: Call) -> bool:
    """Whether ``model`` takes ``call``: many take images and sound of one size alone."""
    args, kwargs = call
    try:
        model(*args, **kwargs)
    except Exception:  # noqa: BLE001 - what eager refuses is no call
        return False
    return True


def is_encoder(config: Any, architectures: Sequence[str], where: str) -> bool:
    """Whether a model is called once, and no causal LM; `UsageError` where that isn't clear."""
    from transformers.models.auto import modeling_auto

    heads, masked = _classes("CAUSAL_LM", config), _classes("MASKED_LM", config)
    pair = bool(getattr(config, "is_encoder_decoder", False))
    if not heads:
        generates = any(_classes(task, config) for task in _GENERATORS)
        if config.model_type not in modeling_auto.MODEL_MAPPING_NAMES or (
            generates and not _has_decoder(config)
        ):
            raise UsageError(
                f"a {config.model_type!r} is neither a causal LM nor called once, as an encoder is",
                where=where,
                hint="compile its parts: a vision or audio encoder has a model type of its own",
            )
        return True
    if not pair and not masked:
        return False
    found = {name in heads - masked for name in architectures}
    if not pair:  # an encoder-decoder's configs set is_decoder by themselves
        found.add(bool(getattr(config, "is_decoder", False)))
    if len(found) > 1:
        raise UsageError(
            "it is not clear whether this model is an encoder or a causal LM: architectures is "
            f"{list(architectures)}, is_decoder is {getattr(config, 'is_decoder', None)}",
            where=where,
            hint=f"a causal LM is {' or '.join(sorted(heads))}, with is_decoder true",
        )
    return found != {True}


def _has_decoder(config: Any) -> bool:
    """Whether the model is an encoder-decoder that generates, as a detector's decoder does not."""
    generates = (*_WITH_ENCODER, "CAUSAL_LM")
    return bool(getattr(config, "is_encoder_decoder", False)) and any(
        _classes(task, config) for task in generates
    )


def _classes(task: str, config: Any) -> set[str]:
    """The classes that a registry of transformers' auto classes has for a family."""
    from transformers.models.auto import modeling_auto

    registry = dict(getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES", {}))
    names = registry.get(config.model_type, ())
    return {names} if isinstance(names, str) else set(names)
