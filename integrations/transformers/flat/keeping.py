"""What another process needs to know to serve a stitched decoder. In: an admitted model. Out: JSON data for an artifact; and its `Serving` again, for a like model.

It runs nothing: what an admission found out by running the model is taken over once everything that it was found out of is the same.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path

import transformers
from torch import nn

from piecework.errors import ArtifactError
from piecework.integrations.transformers.flat.admission import mask_makers, refuse_at_sight
from piecework.integrations.transformers.flat.rope import changing_ropes
from piecework.integrations.transformers.flat.serving import Serving
from piecework.integrations.transformers.own.probe import Forward, embedding_of
from piecework.integrations.transformers.own.settings import ConfigReader
from piecework.integrations.transformers.request.attention import LAYER_NAME, register
from piecework.integrations.transformers.request.state import AttentionLayer, PositionRule
from piecework.runtime.artifact.surroundings import sources
from piecework.runtime.cache.collect import tree_digest

#: Fields of a configuration that say where a model came from or are read in each call, and the dtype, which the weights are compared by.
_NO_EFFECT = (
    *("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"),
    *("use_cache", "return_dict", "output_hidden_states", "output_attentions"),
)
_LOADER = "piecework.integrations.transformers.load"
_AGAIN = "build the model as it was saved, or stitch it with artifact=path, which compiles it again"


def kept_of(model: nn.Module, serving: Serving, entry: str) -> dict[str, object]:
    """What an artifact keeps of an admitted model beside its traces.

    Args:
        entry: what the tokens of its traces come as.
    """
    makers = mask_makers(model)
    output = serving.output_class
    found = {
        "load": _LOADER,
        "entry": entry,
        "of": _outside(model, serving.decoder),
        "layers": [
            [each.name, each.layer_idx, each.layer_type, sorted(each.passed)]
            for each in serving.layers.values()
        ],
        "position rule": serving.position_rule.name,
        "masks": next(name for name, made in makers.items() if made == serving.create_masks),
        "masks see positions": serving.masks_see_positions,
        "output": [output.__module__, output.__qualname__],  # type: ignore[attr-defined]
    }
    return _as_json(found)


def serving_of(
    kept: object, model: nn.Module, decoder: nn.Module, forward: Forward, entry: str
) -> Serving:
    """The serving of an artifact's model for ``model``; its attention modules carry their layer names then.

    Raises:
        ArtifactError: the artifact is of something else, or the model is not like the one that was admitted.
        CaptureError: the model is not fit, such as one in training mode.
    """
    if not isinstance(kept, dict) or kept.get("load") != _LOADER or kept.get("entry") != entry:
        raise ArtifactError(
            f"the artifact is of no decoder that takes {entry}",
            where=type(model).__name__,
            hint="piecework.load(path, model) loads what piecework.compile made",
        )
    refuse_at_sight(decoder, forward)
    _require_same(kept["of"], _outside(model, decoder))
    layers = [_layer(decoder, *each) for each in kept["layers"]]
    register()
    for each in layers:
        setattr(each.module, LAYER_NAME, each.name)
    module, name = kept["output"]
    return Serving(
        decoder=decoder,
        dtype=embedding_of(decoder).dtype,
        device=embedding_of(decoder).device,
        layers={each.name: each for each in layers},
        ropes=changing_ropes(decoder),
        position_rule=PositionRule[kept["position rule"]],
        create_masks=mask_makers(model)[kept["masks"]],
        masks_see_positions=kept["masks see positions"],
        output_class=getattr(importlib.import_module(module), name),
        settings=ConfigReader(decoder.config),
    )


def _outside(model: nn.Module, decoder: nn.Module) -> dict[str, object]:
    """What an admission depends on, other than what the traces compare."""
    config = {k: v for k, v in decoder.config.to_dict().items() if k not in _NO_EFFECT}
    ropes = [[each.layer_type, each.buffer] for each in changing_ropes(decoder)]
    kinds = [type(model), type(decoder)]
    found = {
        "transformers": transformers.__version__,
        "the integration": tree_digest(Path(__file__).parents[1]),
        "class": [f"{each.__module__}.{each.__qualname__}" for each in kinds],
        "source": sources((), kinds),
        "attention": decoder.config._attn_implementation,
        "experts": getattr(decoder.config, "_experts_implementation", None),
        "changing ropes": ropes,
        **{f"config.{name}": value for name, value in config.items()},
    }
    return _as_json(found)


def _as_json(found: Mapping[str, object]) -> dict[str, object]:
    """As it is read back; what JSON does not know counts by its text."""
    data: dict[str, object] = json.loads(json.dumps(found, default=repr))
    return data


def _require_same(before: Mapping[str, object], now: Mapping[str, object]) -> None:
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            raise ArtifactError(
                f"{name} was {_shown(before.get(name))} when the model was saved and is {_shown(now.get(name))} now",
                hint=_AGAIN,
            )


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) < 100 else f"{text[:80]} …"


def _layer(
    decoder: nn.Module, name: str, index: int, layer_type: str | None, passed: list[str]
) -> AttentionLayer:
    try:
        module = decoder.get_submodule(name)
    except AttributeError as error:
        raise ArtifactError(f"the model has no {name}", hint=_AGAIN) from error
    if getattr(module, "layer_idx", None) != index:
        raise ArtifactError(
            f"{name} is layer {getattr(module, 'layer_idx', None)}; when the model was saved it was {index}",
            hint=_AGAIN,
        )
    return AttentionLayer(name, module, index, layer_type, frozenset(passed))
