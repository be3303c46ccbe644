"""The flat way. In: a decoder that `admit` took. Out: forwards of it by a stitched function of one row of tokens, with attention behind a splitting op.

What a forward needs beside that function is `Serving`'s business.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from piecework.errors import CaptureError, UsageError
from piecework.integrations.transformers.flat.admission import forget_layers
from piecework.integrations.transformers.flat.forward import ENTRIES, compile_forward, flattened
from piecework.integrations.transformers.flat.keeping import kept_of, serving_of
from piecework.integrations.transformers.flat.serving import Serving
from piecework.integrations.transformers.own.probe import Forward
from piecework.integrations.transformers.request.static_decode import StaticDecode, static_decode
from piecework.runtime.artifact.load import Artifact
from piecework.runtime.config.compilation import CompilationConfig
from piecework.runtime.stitched import StitchedModule
from piecework.runtime.store.folder import Place

# What is saved takes its tokens so.
_SAVED = "input_ids"


class FlatWay:
    """A decoder served flattened; see `piecework.integrations.transformers.way.Way`.

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

    def serve(self, given: Mapping[str, object]) -> object:
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
        """Have decode steps of static caches served from memory that full graphs can hold; see `static_decode`."""
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
            way = cls(model, serving_of(kept, model, decoder, forward), forward, config)  # type: ignore[arg-type]
            made = way._flattened(_SAVED)
            made.require_made_so(found, (), {})
            made.take(found)
        except BaseException:
            forget_layers(decoder)
            raise
        way._entries[_SAVED] = made
        return way

    def _flattened(self, name: str) -> StitchedModule:
        for rope in self.serving.ropes:
            rope.hold()
        kept = kept_of(self._model, self.serving, name)
        return flattened(self.decoder, self.forward, name, self._config, kept)
