"""What an admission depends on. In: a model and its decoder. Out: JSON data, and the first difference from what it was when the model was saved.

It runs nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import transformers
from torch import nn

from piecework.errors import ArtifactError
from piecework.runtime.artifact.fit import files_of
from piecework.runtime.store.surroundings import source_factors, tree_digest

#: Fields of a configuration that say where a model came from or are read in each call, and the dtype, which the weights are compared by.
_NO_EFFECT = (
    *("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"),
    *("use_cache", "return_dict", "output_hidden_states", "output_attentions"),
)
LOADER, SAVER = (f"piecework.integrations.transformers.{name}" for name in ("load", "save"))
AGAIN = "build the model as it was saved, or stitch it with artifact=path, which compiles it again"


def outside(model: nn.Module, decoder: nn.Module) -> dict[str, object]:
    """What an admission depends on, other than what the traces compare."""
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


def as_json(found: Mapping[str, object]) -> dict[str, object]:
    """As it is read back; what JSON does not know counts by its text."""
    data: dict[str, object] = json.loads(json.dumps(found, default=repr))
    return data


def require_same_outside(before: Mapping[str, object], now: Mapping[str, object]) -> None:
    """Raise `ArtifactError` at the first difference from what `outside` said when the model was saved."""
    found = as_json(now)
    for name in sorted(before.keys() | found.keys()):
        if before.get(name) != found.get(name):
            raise ArtifactError(
                f"{name} was {_shown(before.get(name))} when the model was saved and is {_shown(found.get(name))} now",
                hint=AGAIN,
            )


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) < 100 else f"{text[:80]} …"
