"""Whether a model is called once, as an encoder is, or generates: by its config, and no model
loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from piecework.errors import UsageError


def is_encoder(config: Any, architectures: Sequence[str], where: str) -> bool:
    """Whether the model of ``config`` is called once; False for a causal LM.

    Args:
        config: of transformers.
        architectures: what its file names, which need not be all that transformers makes of it.
        where: for errors: the file.

    Raises:
        UsageError: it generates text from images or sound, transformers has no class of such a
            name, or no model of the family, or the fields contradict each other.
    """
    import transformers

    heads, masked = _heads("CAUSAL_LM", config), _heads("MASKED_LM", config)
    pair = bool(getattr(config, "is_encoder_decoder", False))
    if heads and not pair and not masked:
        return False
    unknown = [name for name in architectures if not hasattr(transformers, name)]
    if unknown:
        raise UsageError(
            f"architectures names {', '.join(unknown)}, which transformers {transformers.__version__} does not have",
            where=where,
            hint="name a class of transformers, or leave architectures out",
        )
    if not heads:
        _refuse_generators(config, where)
        return True
    said = {name in heads - masked for name in architectures}
    if not pair:  # an encoder-decoder's configs set is_decoder by themselves
        said.add(bool(getattr(config, "is_decoder", False)))
    if len(said) > 1:
        raise UsageError(
            "it is not clear whether this model is an encoder or a causal LM: "
            f"architectures is {list(architectures)}, is_decoder is {getattr(config, 'is_decoder', None)}",
            where=where,
            hint=f"a causal LM is {' or '.join(sorted(heads))} with is_decoder true; an encoder is another class with is_decoder false",
        )
    return said != {True}


def has_decoder(config: Any) -> bool:
    """Whether the model is an encoder-decoder that generates, as a detector's decoder does not."""
    generates = (*_WITH_ENCODER, "CAUSAL_LM")
    return bool(getattr(config, "is_encoder_decoder", False)) and any(
        config.model_type in registered(task) for task in generates
    )


def registered(task: str) -> dict[str, Any]:
    """A registry of transformers' auto classes, by family; {} for one that this version lacks."""
    from transformers.models.auto import modeling_auto

    return dict(getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES", {}))


_WITH_ENCODER = ("SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "TEXT_TO_WAVEFORM")
_GENERATORS = ("IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", *_WITH_ENCODER)


def _heads(task: str, config: Any) -> set[str]:
    names = registered(task).get(config.model_type, ())
    return {names} if isinstance(names, str) else set(names)


def _refuse_generators(config: Any, where: str) -> None:
    from transformers.models.auto import modeling_auto

    family = config.model_type
    if any(family in registered(task) for task in _GENERATORS) and not has_decoder(config):
        raise UsageError(
            f"a model of type {family!r} generates text from images or sound, which neither the causal LMs' integration nor the encoders' serves",
            where=where,
            hint="compile its parts: its vision or audio encoder has a model type of its own",
        )
    if family not in modeling_auto.MODEL_MAPPING_NAMES:
        raise UsageError(
            f"transformers has no AutoModel for the model type {family!r}",
            where=where,
            hint="use a factory: module:factory that returns (module, example_inputs)",
        )
