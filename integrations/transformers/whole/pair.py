"""An encoder-decoder. In: the way that serves its decoder whole, and the one that serves its encoder so, or why there is none. Out: one way, with the modules and the artifact of both.

A call of either goes straight to its own way; nothing of the two is shared but what is saved.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack

from torch import nn
from transformers import PreTrainedModel

from piecework.errors import ArtifactError, CaptureError, UsageError
from piecework.integrations.transformers.own.probe import Forward
from piecework.integrations.transformers.own.refusals import refuse_model
from piecework.integrations.transformers.whole.admission import admit_whole
from piecework.integrations.transformers.whole.keeping import KINDS, KeptWay
from piecework.integrations.transformers.whole.way import WholeWay
from piecework.runtime.artifact.load import Artifact
from piecework.runtime.artifact.save import save_together
from piecework.runtime.artifact.values import from_bytes
from piecework.runtime.config.compilation import CompilationConfig
from piecework.runtime.stitched import StitchedModule
from piecework.runtime.store.folder import Place

ENCODER = "encoder"
_KINDS = f"{ENCODER}_{KINDS}"


class PairWay:
    """A decoder and the encoder beside it; see `piecework.integrations.transformers.way.Way`.

    Args:
        of_decoder: serves the decoder.
        encoder: serves the encoder, or says why its own forward does.

    Attributes:
        not_flat, as_it_is: of the decoder.
    """

    name = WholeWay.name

    def __init__(self, of_decoder: WholeWay, encoder: WholeWay | str) -> None:
        self.of_decoder = of_decoder
        self.encoder = encoder

    @property
    def not_flat(self) -> CaptureError | None:
        return self.of_decoder.not_flat

    @not_flat.setter
    def not_flat(self, why: CaptureError | None) -> None:
        self.of_decoder.not_flat = why

    @property
    def decoder(self) -> nn.Module:
        return self.of_decoder.decoder

    @property
    def forward(self) -> Forward:
        return self.of_decoder.forward

    @property
    def as_it_is(self) -> Counter[str]:
        """Calls that the model's own forwards served; those of the encoder are said to be its."""
        if isinstance(self.encoder, str):
            return self.of_decoder.as_it_is
        of_encoder = {f"{ENCODER}: {why}": n for why, n in self.encoder.as_it_is.items()}
        return self.of_decoder.as_it_is + Counter(of_encoder)

    def beside(self) -> tuple[WholeWay, ...]:
        """Ways of other modules than the decoder."""
        return () if isinstance(self.encoder, str) else (self.encoder,)

    def serve(self, given: Mapping[str, object]) -> object:
        """One forward of the decoder.

        Raises:
            InputError: the arguments ask for what a stitched decoder can't give.
        """
        return self.of_decoder.serve(given)

    def is_compiled(self, given: Mapping[str, object]) -> bool:
        return self.of_decoder.is_compiled(given)

    def entry(self, name: str) -> StitchedModule:
        """As of `WholeWay`; "encoder" is the first kind of its calls that was compiled."""
        if name != ENCODER:
            return self.of_decoder.entry(name)
        if isinstance(self.encoder, str):
            raise UsageError(
                f"the encoder is not stitched: {self.encoder}",
                where="entry",
                hint="input_ids or decode",
            )
        return self.encoder.entry("input_ids")

    def modules(self) -> dict[str, StitchedModule]:
        found = self.of_decoder.modules()
        for each in self.beside():
            found.update({f"{ENCODER}: {name}": made for name, made in each.modules().items()})
        return found

    def save(self, place: Place, key_file: str | os.PathLike[str] | None) -> None:
        """Write what serves every kind of call of both that came so far.

        Raises:
            ArtifactError: as `StitchedModule.save`.
        """
        with ExitStack() as stack:
            kept, parts = self.of_decoder.kept(stack)
            if isinstance(self.encoder, str):
                of_encoder: object = self.encoder
            else:
                found, more = self.encoder.kept(stack)
                of_encoder, parts = found.values(), [*parts, *more]
            values = {KINDS: kept.values(), _KINDS: of_encoder}
            save_together(place, parts, parts[0].settings, values, key_file=key_file)

    @classmethod
    def of_artifact(
        cls,
        found: Artifact,
        model: nn.Module,
        decoder: nn.Module,
        config: CompilationConfig | None,
    ) -> PairWay:
        """The way that `save` wrote, for a model like the one that it was admitted for.

        Raises:
            ArtifactError: it does not fit.
            CaptureError: the model is not fit, such as one in training mode.
        """
        parts = iter(found.parts())
        of_decoder = WholeWay.of_kept(
            KeptWay.of_values(from_bytes(found.folder.read(KINDS), KINDS)),
            *(parts, model, decoder, config),
        )
        kept = from_bytes(found.folder.read(_KINDS), _KINDS)
        encoder = encoder_of(model, decoder)
        if isinstance(kept, str):
            return cls(of_decoder, kept)
        if encoder is None:
            raise ArtifactError(
                "the artifact is of a model with an encoder", where=type(model).__name__
            )
        return cls(
            of_decoder,
            WholeWay.of_kept(KeptWay.of_values(kept), parts, model, encoder, config),
        )


def admit_pair(
    model: nn.Module, decoder: nn.Module, forward: Forward, config: CompilationConfig | None
) -> PairWay:
    """Prove on a few tokens that the decoder can be served whole, and its encoder; an encoder that can't stays as it is.

    Raises:
        CaptureError: the decoder is not fit, and why.
        PieceCompileError: as ``piecework.compile``.
    """
    of_decoder = admit_whole(model, decoder, forward, config)
    encoder = encoder_of(model, decoder)
    if encoder is None:
        return PairWay(of_decoder, "no encoder was found beside the decoder")
    try:
        refuse_model(encoder)
        return PairWay(of_decoder, admit_whole(model, encoder, encoder.forward, config))
    except CaptureError as error:
        return PairWay(of_decoder, error.message)


def encoder_of(model: nn.Module, decoder: nn.Module) -> PreTrainedModel | None:
    """The encoder of an encoder-decoder; None if transformers knows none beside the decoder."""
    found = model.get_encoder()  # type: ignore[operator]
    if found is decoder or found is model or not isinstance(found, PreTrainedModel):
        return None
    return found
