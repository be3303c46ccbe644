"""The flat way: a decoder's forwards by a stitched function of one row of tokens."""

from __future__ import annotations

import importlib
import os
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from piecework.errors import ArtifactError, CaptureError, UsageError
from piecework.integrations.transformers.flat.admission import (
    forget_layers,
    mask_makers,
    refuse_at_sight,
)
from piecework.integrations.transformers.flat.forward import ENTRIES, compile_forward, flattened
from piecework.integrations.transformers.flat.rope import changing_ropes
from piecework.integrations.transformers.flat.serving import Serving
from piecework.integrations.transformers.own.keeping import AGAIN, kept_of, require_like
from piecework.integrations.transformers.own.probe import Forward, embedding_of
from piecework.integrations.transformers.own.refusals import ConfigReader
from piecework.integrations.transformers.request.attention import LAYER_NAME, register
from piecework.integrations.transformers.request.state import AttentionLayer, PositionRule
from piecework.integrations.transformers.request.static_decode import StaticDecode, static_decode
from piecework.runtime.artifact.load import Artifact
from piecework.runtime.config.compilation import CompilationConfig
from piecework.runtime.stitched import StitchedModule
from piecework.runtime.store.folder import Place

# What is saved takes its tokens so.
_SAVED = "input_ids"


class FlatWay:
    """A decoder served flattened.

    Args:
        model: what was stitched.
        serving: how a forward of its decoder is served.
        forward: the decoder's own forward, bound.
        config: handed to ``piecework.compile``.
    """

    name = "flat"

    def __init__(
        self, model: nn.Module, serving: Serving, forward: Forward, config: CompilationConfig | None
    ) -> None:
        self._model = model
        self.serving = serving
        self.decoder = serving.decoder
        self.forward = forward
        self.not_flat: CaptureError | None = None
        self.as_it_is: Counter[str] = Counter()
        self._config = config
        self._entries: dict[str, StitchedModule] = {}
        self._compiling = threading.Lock()

    def ways(self) -> list[FlatWay]:
        return [self]

    def serve(self, given: Mapping[str, object]) -> object:
        """One forward, its arguments by name."""
        return self.serving.serve(given, self._run)

    def is_compiled(self, given: Mapping[str, object]) -> bool:
        made = self._entries.get(
            "input_ids" if given.get("inputs_embeds") is None else "inputs_embeds"
        )
        return made is not None and bool(made.traces)

    def _run(self, entry: str, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        compiled = self._entries.get(entry)
        if compiled is None:
            compiled = self.entry(entry)
        return compiled(tokens, positions)

    def entry(self, name: str) -> StitchedModule:
        """The stitched function for tokens that come as ``name``, compiled when first asked for."""
        if name not in ENTRIES:
            raise UsageError(
                f"there is no entry {name!r}", where="entry", hint=" or ".join(ENTRIES)
            )
        with self._compiling:
            if name not in self._entries:
                made = self._flattened(name)
                compile_forward(made, self.decoder, name)
                self._entries[name] = made
            return self._entries[name]

    def static_decode(self, largest: int, length: int) -> StaticDecode:
        """Have decode steps of static caches served from memory that full graphs can hold."""
        static = static_decode(
            self.entry("input_ids"),
            self.serving.layers,
            self.decoder.config,
            largest=largest,
            length=length,
        )
        self.serving = replace(self.serving, static=static)
        return static

    def modules(self) -> dict[str, StitchedModule]:
        return dict(self._entries)

    def save(self, place: Place, key_file: str | os.PathLike[str] | None) -> None:
        """Write what serves token ids; embeddings are compiled anew."""
        self.entry(_SAVED).save(place, key_file=key_file)

    @classmethod
    def of_artifact(
        cls, found: Artifact, model: nn.Module, decoder: nn.Module, config: CompilationConfig | None
    ) -> FlatWay:
        """The way that `save` wrote, for a model like the one that it was admitted for.

        Raises:
            ArtifactError: it does not fit; the decoder is left as it was.
            CaptureError: the model is not fit, such as one in training mode.
        """
        kept, forward = found.folder.facts["kept"], decoder.forward
        try:
            way = cls(model, _serving_of(kept, model, decoder, forward), forward, config)  # type: ignore[arg-type]
            made = way._flattened(_SAVED)
            made.require_made_so(found, (), {})
            made.take(found)
        except BaseException:
            forget_layers(decoder)
            raise
        way._entries[_SAVED] = made
        return way

    def _flattened(self, name: str) -> StitchedModule:
        serving = self.serving
        for rope in serving.ropes:
            rope.hold()
        makers, output = mask_makers(self._model), serving.output_class
        layers = [
            [each.name, each.layer_idx, each.layer_type, sorted(each.passed)]
            for each in serving.layers.values()
        ]
        kept = kept_of(
            self._model,
            self.decoder,
            way=self.name,
            entry=name,
            layers=layers,
            position_rule=serving.position_rule.name,
            masks=next(key for key, made in makers.items() if made == serving.create_masks),
            masks_see_positions=serving.masks_see_positions,
            output=[output.__module__, output.__qualname__],  # type: ignore[attr-defined]
        )
        return flattened(self.decoder, self.forward, name, self._config, kept)


def _serving_of(
    kept: Mapping[str, Any], model: nn.Module, decoder: nn.Module, forward: Forward
) -> Serving:
    """The serving that an artifact tells of; attention modules carry their layer names then."""
    refuse_at_sight(decoder, forward)
    require_like(kept, model, decoder)
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
        position_rule=PositionRule[kept["position_rule"]],
        create_masks=mask_makers(model)[kept["masks"]],
        masks_see_positions=kept["masks_see_positions"],
        output_class=getattr(importlib.import_module(module), name),
        settings=ConfigReader(decoder.config),
    )


def _layer(
    decoder: nn.Module, name: str, index: int, layer_type: str | None, passed: list[str]
) -> AttentionLayer:
    try:
        module = decoder.get_submodule(name)
    except AttributeError as error:
        raise ArtifactError(f"the model has no {name}", hint=AGAIN) from error
    now = getattr(module, "layer_idx", None)
    if now != index:
        raise ArtifactError(
            f"{name} is layer {now}; when the model was saved it was {index}", hint=AGAIN
        )
    return AttentionLayer(name, module, index, layer_type, frozenset(passed))
