"""What another process needs to know to serve a stitched decoder. In: an admitted model. Out: JSON data for an artifact; and its `Serving` again, for a like model.

It runs nothing: what an admission found out by running the model is taken over once everything that it was found out of is the same.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from torch import nn

from piecework.errors import ArtifactError
from piecework.integrations.transformers.flat.admission import mask_makers, refuse_at_sight
from piecework.integrations.transformers.flat.rope import changing_ropes
from piecework.integrations.transformers.flat.serving import Serving
from piecework.integrations.transformers.own.outside import (
    AGAIN,
    LOADER,
    as_json,
    outside,
    require_same_outside,
)
from piecework.integrations.transformers.own.probe import Forward, embedding_of
from piecework.integrations.transformers.own.settings import ConfigReader
from piecework.integrations.transformers.request.attention import LAYER_NAME, register
from piecework.integrations.transformers.request.state import AttentionLayer, PositionRule


def kept_of(model: nn.Module, serving: Serving, entry: str) -> dict[str, object]:
    """What an artifact keeps of an admitted model beside its traces.

    Args:
        entry: what the tokens of its traces come as.
    """
    makers = mask_makers(model)
    output = serving.output_class
    found = {
        "load": LOADER,
        "way": "flat",
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
    return as_json(found)


def serving_of(
    kept: Mapping[str, Any], model: nn.Module, decoder: nn.Module, forward: Forward
) -> Serving:
    """The serving of an artifact's model for ``model``; its attention modules carry their layer names then.

    Raises:
        ArtifactError: the model is not like the one that was admitted.
        CaptureError: the model is not fit, such as one in training mode.
    """
    refuse_at_sight(decoder, forward)
    require_same_outside(kept["of"], _outside(model, decoder))
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
    ropes = [[each.layer_type, each.buffer] for each in changing_ropes(decoder)]
    return {**outside(model, decoder), "changing ropes": ropes}


def _layer(
    decoder: nn.Module, name: str, index: int, layer_type: str | None, passed: list[str]
) -> AttentionLayer:
    try:
        module = decoder.get_submodule(name)
    except AttributeError as error:
        raise ArtifactError(f"the model has no {name}", hint=AGAIN) from error
    if getattr(module, "layer_idx", None) != index:
        raise ArtifactError(
            f"{name} is layer {getattr(module, 'layer_idx', None)}; when the model was saved it was {index}",
            hint=AGAIN,
        )
    return AttentionLayer(name, module, index, layer_type, frozenset(passed))
