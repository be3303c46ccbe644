"""Models of transformers that are called once, for the command line: text, vision, audio, encoders.

Nothing is downloaded; random weights and example arguments are seeded.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import partial
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
from piecework.integrations.encoders.kinds import has_decoder, is_encoder
from piecework.integrations.protocol import (
    Call,
    LoadedModel,
    first_line,
    require_packages,
    with_seeded_weights,
    with_weights,
)


def load(path: Path, seed: int) -> LoadedModel | None:
    """The model of a folder or ``config.json``; None for a causal LM, or no model of transformers.

    Raises:
        UsageError: it can't be loaded.
    """
    file = path / "config.json" if path.is_dir() else path
    fields = config_fields(file)
    if not isinstance(fields.get("model_type"), str):
        return None
    require_packages(("transformers",), "transformers")
    config = _config(file, fields)
    if not is_encoder(config, fields.get("architectures") or (), str(file)):
        return None
    without_caches(config)
    import transformers

    if path.is_dir() and any(any(path.glob(kind)) for kind in ("*.safetensors", "*.bin")):
        made = with_weights(transformers.AutoModel, path, config=config)
    else:
        make = partial(transformers.AutoModel.from_config, config, dtype=torch.float32)
        made = with_seeded_weights(make, config.model_type, file, seed)
    model = called_part(made).eval().requires_grad_(False)
    calls = example_calls(model, file, candidates(model))
    return LoadedModel.of_calls(model, calls, file.read_text())


def config_fields(file: Path) -> dict[str, Any]:
    """The fields of a ``config.json``; {} if the file is not there, or something else."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def called_part(model: torch.nn.Module) -> torch.nn.Module:
    """What of a model is called once: the encoder of one that generates, else the whole."""
    return model.get_encoder() if has_decoder(model.config) else model  # type: ignore[operator,no-any-return]


def without_caches(config: Any) -> None:
    """Keep a model, and the decoder in it, from returning a cache."""
    for each in (config, getattr(config, "text_config", None), getattr(config, "decoder", None)):
        if each is not None and hasattr(each, "use_cache"):
            each.use_cache = False


def example_calls(model: torch.nn.Module, file: Path, candidates: Iterable[Ways]) -> list[Call]:
    """The call to trace ``model`` with, in the first way that runs, and others that it takes.

    Raises:
        UsageError: it takes no arguments that are known here.
    """
    try:
        ways = first_that_runs(model, candidates)
    except ValueError as error:
        raise UsageError(
            f"no arguments are known that a {type(model).__name__} takes: {error}",
            where=str(file),
            hint="use a factory: module:factory that returns (module, example_inputs)",
        ) from error
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


def _config(file: Path, fields: dict[str, Any]) -> Any:
    import transformers

    transformers.logging.set_verbosity_error()
    if fields["model_type"] not in transformers.CONFIG_MAPPING:
        raise UsageError(
            f"transformers {transformers.__version__} knows no model type {fields['model_type']!r}",
            where=str(file),
            hint="it must be the config.json of a transformers model, with its model_type",
        )
    try:
        return transformers.AutoConfig.for_model(**fields)
    except Exception as error:  # fields are checked by each config in its own way
        raise UsageError(
            f"{str(file)!r} is not a model config: {first_line(error)}",
            hint="it must be the config.json of a transformers model, with its model_type",
        ) from error
