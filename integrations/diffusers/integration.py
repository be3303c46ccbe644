"""Diffusion transformers of diffusers, for the command line. In: a local folder or a ``config.json`` with ``_class_name``. Out: a `LoadedModel` that is called once, a step of a denoising loop.

Nothing is downloaded; random weights and example arguments are seeded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from piecework.errors import UsageError
from piecework.integrations.diffusers.arguments import candidates
from piecework.integrations.encoders.integration import config_fields, example_calls
from piecework.integrations.plain import Plain, loaded_from
from piecework.integrations.protocol import LoadedModel, first_line, require_packages
from piecework.integrations.seeded import add_noise


class DiffusionTransformer(Plain):
    """A transformer of diffusers; see `piecework.integrations.protocol.Integration`."""

    def load(self, path: Path, seed: int) -> LoadedModel | None:
        file = path / "config.json" if path.is_dir() else path
        fields = config_fields(file)
        name = fields.get("_class_name")
        if not isinstance(name, str):
            return None
        require_packages(("diffusers",), "diffusers")
        made = _class(name, file)
        weights = path.is_dir() and any(path.glob("*.safetensors"))
        model = _with_weights(made, path) if weights else _random(made, fields, file, seed)
        model.eval().requires_grad_(False)
        calls = example_calls(model, file, candidates(model))
        return loaded_from(model, calls, self, file.read_text())


INTEGRATION = DiffusionTransformer()


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


def _with_weights(made: Any, path: Path) -> torch.nn.Module:
    try:
        return made.from_pretrained(path, local_files_only=True)  # type: ignore[no-any-return]
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"can't load the model in {str(path)!r}: {first_line(error)}") from error


def _random(made: Any, fields: dict[str, Any], file: Path, seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    try:
        model = made.from_config(fields)
    except (
        Exception
    ) as error:  # a config that doesn't fit its model fails in its layers, with any error
        raise UsageError(
            f"no {made.__name__} can be made of {str(file)!r}: {type(error).__name__}: {first_line(error)}"
        ) from error
    add_noise(model, seed)
    return model  # type: ignore[no-any-return]
