"""Diffusion transformers of diffusers for the command line, called once: a step of a denoising
loop.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from piecework.errors import UsageError
from piecework.integrations.diffusers.arguments import candidates
from piecework.integrations.encoders.integration import config_fields, example_calls
from piecework.integrations.protocol import (
    LoadedModel,
    require_packages,
    with_seeded_weights,
    with_weights,
)


def load(path: Path, seed: int) -> LoadedModel | None:
    """The transformer of a local folder or ``config.json``; None for what has no ``_class_name``.

    Raises:
        UsageError: it can't be loaded.
    """
    file = path / "config.json" if path.is_dir() else path
    fields = config_fields(file)
    name = fields.get("_class_name")
    if not isinstance(name, str):
        return None
    require_packages(("diffusers",), "diffusers")
    made = _class(name, file)
    if path.is_dir() and any(path.glob("*.safetensors")):
        model = with_weights(made, path)
    else:
        model = with_seeded_weights(lambda: made.from_config(fields), name, file, seed)
    model.eval().requires_grad_(False)
    calls = example_calls(model, file, candidates(model))
    return LoadedModel.of_calls(model, calls, file.read_text())


def _class(name: str, file: Path) -> Any:
    import diffusers

    found = getattr(diffusers, name, None)
    if not (isinstance(found, type) and issubclass(found, torch.nn.Module)):
        raise UsageError(
            f"diffusers {diffusers.__version__} has no model {name!r}",
            where=str(file),
            hint="give the folder or config.json of a pipeline's transformer, not of the pipeline",
        )
    return found
