"""What an artifact says of an admitted model, and whether another one is like it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from torch import nn

from piecework.errors import ArtifactError
from piecework.runtime.artifact.fit import files_of
from piecework.runtime.store.surroundings import source_factors, tree_digest

#: Fields that say where a model came from, are read in each call, or are compared by the weights.
_NO_EFFECT = (
    *("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"),
    *("use_cache", "return_dict", "output_hidden_states", "output_attentions"),
)
LOADER, SAVER = (f"piecework.integrations.transformers.{name}" for name in ("load", "save"))
AGAIN = "build the model as it was saved, or stitch it with artifact=path, which compiles it again"


def kept_of(model: nn.Module, decoder: nn.Module, **found: object) -> dict[str, Any]:
    """As JSON reads it back: what an admission depends on, and what it found."""
    kept = {"load": LOADER, "of": _outside(model, decoder), **found}
    data: dict[str, Any] = json.loads(json.dumps(kept, default=repr))
    return data


def _outside(model: nn.Module, decoder: nn.Module) -> dict[str, object]:
    config = {k: v for k, v in decoder.config.to_dict().items() if k not in _NO_EFFECT}
    kinds = [type(model), type(decoder)]
    return {
        "transformers": transformers.__version__,
        "the integration": tree_digest(Path(__file__).parents[1]),
        "class": [f"{each.__module__}.{each.__qualname__}" for each in kinds],
        "source": source_factors(files_of(kinds)),
        "attention": decoder.config._attn_implementation,
        "experts": getattr(decoder.config, "_experts_implementation", None),
        **{f"config.{name}": value for name, value in config.items()},
    }


def require_like(kept: Mapping[str, Any], model: nn.Module, decoder: nn.Module) -> None:
    """Raise `ArtifactError` at the first difference from the saved model."""
    before, now = kept["of"], kept_of(model, decoder)["of"]
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            raise ArtifactError(
                f"{name} was {_shown(before.get(name))} when the model was saved and is {_shown(now.get(name))} now",
                hint=AGAIN,
            )


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) < 100 else f"{text[:80]} …"
