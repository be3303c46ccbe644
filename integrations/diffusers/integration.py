"""Diffusion transformers of diffusers for the command line, called once: a step of a denoising
loop.
"""

from __future__ import annotations

from pathlib import Path

import torch

from piecework.errors import UsageError
from piecework.integrations.diffusers.arguments import candidates
from piecework.integrations.encoders.integration import example_calls
from piecework.integrations.protocol import (
    LoadedModel,
    add_noise,
    config_in,
    model_of,
    require_packages,
)


def load(path: Path, seed: int) -> LoadedModel | None:
    """The transformer of a folder or ``config.json``; None for what has no ``_class_name``."""
    file, fields = config_in(path)
    name = fields.get("_class_name")
    if not isinstance(name, str):
        return None
    require_packages(("diffusers",), "diffusers")
    import diffusers

    kind = getattr(diffusers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, torch.nn.Module)):
        why = f"diffusers {diffusers.__version__} has no model {name!r}"
        hint = "give the folder or config.json of a pipeline's transformer, not of the pipeline"
        raise UsageError(why, where=str(file), hint=hint)

    def make() -> torch.nn.Module:
        return add_noise(kind.from_config(fields), seed)  # type: ignore[attr-defined]

    model = model_of(kind, path, seed, make)
    return LoadedModel.of_calls(
        model, example_calls(model, file, candidates(model)), file.read_text()
    )
