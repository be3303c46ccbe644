"""Families of transformers.

Decoders of text are left out: `piecework.integrations.transformers` serves those with their caches.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from piecework.bench.lists.sample import Row, Sample
from piecework.bench.lists.shrink import LEVELS, shrink
from piecework.errors import UsageError
from piecework.integrations.encoders.arguments import (
    SEED,
    SIZES,
    Size,
    Ways,
    candidates,
    example,
    first_that_runs,
)
from piecework.integrations.encoders.integration import called_part, is_encoder, without_caches
from piecework.integrations.protocol import Call, add_noise

LARGEST = 60_000_000  # parameters

Make = Callable[[str, int], torch.nn.Module]

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
    return [
        Row("transformers", name, partial(_sample_of, name), kind) for name, kind in found.items()
    ]


def heads() -> list[Row]:
    """A row per class in the registries of tasks, as users make it.

    Raises:
        ImportError: transformers is not installed.
    """
    from transformers.models.auto import modeling_auto

    found: dict[str, tuple[str, str]] = {}
    for registry in sorted(vars(modeling_auto)):
        told = re.fullmatch(r"MODEL_FOR_(\w+)_MAPPING_NAMES", registry)
        for family, names in getattr(modeling_auto, registry).items() if told else ():
            for name in (names,) if isinstance(names, str) else names:
                found.setdefault(name, (family, told[1]))  # type: ignore[index]
    return [
        Row("heads", name, partial(_sample_of, family, partial(_with_head, name)), task)
        for name, (family, task) in found.items()
    ]


def encoders() -> list[Row]:
    """The families of `families` that are no time series.

    Raises:
        ImportError: transformers is not installed.
    """
    return [
        Row("encoders", each.name, partial(_encoder_of, each.name), each.kind)
        for each in families()
        if each.kind != "time series"
    ]


def is_encoder_family(family: str) -> bool:
    """Whether a config of ``family`` that says nothing else is one of an encoder."""
    from transformers import AutoConfig

    try:
        return is_encoder(AutoConfig.for_model(family), (), family)
    except UsageError:
        return False


def _sample_of(family: str, make: Make | None = None) -> Sample:
    model, ways = build(family, make=make)
    return Sample(lambda: copy.deepcopy(model), lambda n: ways(Size(n)))


def _encoder_of(family: str) -> Sample:
    model, ways = build(family, called_part)
    first, *others = (size.rows for size in SIZES)

    def arguments(rows: int) -> Call:
        return example(ways) if rows == first else ways(SIZES[[first, *others].index(rows)])

    return Sample(lambda: copy.deepcopy(model), arguments, first, others)


def build(
    family: str,
    part: Callable[[torch.nn.Module], torch.nn.Module] = lambda model: model,
    make: Make | None = None,
) -> tuple[torch.nn.Module, Ways]:
    """A small model of ``family`` with seeded weights, and ways to call it.

    Args:
        part: what is called of a model.
        make: makes one from the family and a level of `LEVELS`; its `AutoModel` if None.

    Raises:
        ValueError: no small config with these arguments runs; the message has the last reason.
    """
    reason: object = "no arguments known"
    for level in range(len(LEVELS)):
        try:
            model = part((make or _model)(family, level))
            return model, first_that_runs(model, candidates(model))
        except Exception as error:  # noqa: BLE001 - a config or arguments that it doesn't take
            reason = error
    raise ValueError(
        f"{type(reason).__name__}: {str(reason).strip().splitlines()[0][:120] if str(reason) else ''}"
    )


def small_config(family: str, level: int) -> Any:
    """A config of ``family``, made small; see `shrink`."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(family)
    shrink(config, level)
    return config


def small_model(make: Callable[..., Any], config: Any, seed: int) -> torch.nn.Module:
    """A model of ``config`` with seeded weights.

    Args:
        make: transformers' function that makes it, such as ``AutoModel.from_config``.

    Raises:
        ValueError: it is not small.
    """
    with torch.device("meta"):
        size = sum(each.numel() for each in make(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size / 1e6:.0f} million parameters")
    torch.manual_seed(seed)
    made: torch.nn.Module = make(config, dtype=torch.float32)
    return made.eval()


def _model(family: str, level: int) -> torch.nn.Module:
    from transformers import AutoModel

    config = small_config(family, level)
    without_caches(config)
    model = small_model(AutoModel.from_config, config, SEED)
    add_noise(model, SEED)
    return model


def _with_head(name: str, family: str, level: int) -> torch.nn.Module:
    import transformers

    config = small_config(family, level)
    text = config.get_text_config()
    if getattr(text, "pad_token_id", 0) is None:
        # Several rows are classified by where padding begins.
        text.pad_token_id = 0
    model = small_model(getattr(transformers, name)._from_config, config, SEED)
    add_noise(model, SEED)
    return model
