"""Which way serves a decoder. In: a model. Out: the flat way, or the whole way where the flat one refuses; and which it was, in words.

What each way needs of a decoder is the business of its admission.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from piecework.errors import ArtifactError, CaptureError, ConfigError
from piecework.integrations.transformers.flat.admission import admit, forget_layers
from piecework.integrations.transformers.flat.way import FlatWay
from piecework.integrations.transformers.own.outside import LOADER
from piecework.integrations.transformers.own.probe import Forward, is_encoder_decoder
from piecework.integrations.transformers.own.refusals import refuse_model
from piecework.integrations.transformers.way import Way
from piecework.integrations.transformers.whole.admission import admit_whole
from piecework.integrations.transformers.whole.pair import PairWay, admit_pair
from piecework.integrations.transformers.whole.way import WholeWay
from piecework.runtime import torch_compat
from piecework.runtime.artifact.load import Artifact
from piecework.runtime.config.compilation import CompilationConfig
from piecework.runtime.stitched import StitchedModule

NAMES = (FlatWay.name, WholeWay.name)


def chosen_way(
    model: nn.Module, decoder: nn.Module, config: CompilationConfig | None, wanted: str | None
) -> Way:
    """The first way that takes the decoder, compiled unless torch's compiler is off.

    Args:
        wanted: the name of the one way that is allowed; None for any.

    Raises:
        CaptureError: none takes it, and why; the model is left as it was.
        ConfigError: there is no way of that name.
    """
    if wanted not in (None, *NAMES):
        raise ConfigError(f"there is no way {wanted!r}", where="way", hint=" or ".join(NAMES))
    forward: Forward = decoder.forward
    refuse_model(decoder)
    admit_as_whole = admit_pair if is_encoder_decoder(decoder) else admit_whole
    if wanted == WholeWay.name:
        return admit_as_whole(model, decoder, forward, config)
    try:
        return _flat_way(model, decoder, forward, config)
    except CaptureError as error:
        if wanted is not None:
            raise
        refused = error
    try:
        way = admit_as_whole(model, decoder, forward, config)
    except CaptureError as error:
        raise CaptureError(
            f"it can't be served flattened: {_said(refused)}; nor whole: {error.message}",
            where=error.where or type(decoder).__name__,
            hint=error.hint,
        ) from error
    way.not_flat = refused
    return way


def way_of(
    found: Artifact,
    model: nn.Module,
    decoder: nn.Module,
    config: CompilationConfig | None,
    wanted: str | None = None,
) -> Way:
    """The way that an artifact is of, for a model like the one that was saved.

    Args:
        wanted: the name of the one way that is allowed; None for any.

    Raises:
        ArtifactError: it is of something else, or does not fit; the model is left as it was.
        CaptureError: the model is not fit, such as one in training mode.
    """
    kept = found.folder.facts.get("kept")
    name = kept.get("way") if isinstance(kept, dict) and kept.get("load") == LOADER else None
    whole = PairWay if is_encoder_decoder(decoder) else WholeWay
    ways = {each.name: each.of_artifact for each in (FlatWay, whole)}
    if name not in ways:
        raise ArtifactError(
            "the artifact is of no decoder of transformers",
            where=type(model).__name__,
            hint="piecework.load(path, model) loads what piecework.compile made",
        )
    if wanted not in (None, name):
        raise ArtifactError(
            f"the artifact is of the {name} way, and {wanted!r} is wanted",
            hint=f"leave way out, say way={name!r}, or save it anew",
        )
    return ways[name](found, model, decoder, config)


def _said(error: CaptureError) -> str:
    """A refusal without its hint."""
    return error.message if error.where is None else f"{error.message} ({error.where})"


def _flat_way(
    model: nn.Module, decoder: nn.Module, forward: Forward, config: CompilationConfig | None
) -> FlatWay:
    serving = admit(model, decoder, forward)
    try:
        way = FlatWay(model, serving, forward, config)
        if torch_compat.compiler_off() is None:
            way.entry("input_ids")
    except BaseException:
        forget_layers(decoder)
        raise
    return way


@dataclass(frozen=True, slots=True)
class Served:
    """How a stitched model is served.

    Attributes:
        way: "flat" or "whole".
        not_flat: why the flat way did not take it, if it was asked.
        modules: the stitched modules, by the calls that they serve.
        as_it_is: how many calls the model's own forward served, by the reason.
        outside: how many decode steps of static caches ran outside full graphs that were captured for such, by the reason.
    """

    way: str
    not_flat: str
    modules: Mapping[str, StitchedModule]
    as_it_is: Mapping[str, int]
    outside: Mapping[str, int]

    def __str__(self) -> str:
        because = f": {self.not_flat}" if self.not_flat else ""
        lines = [f"{self.way}{because}"]
        lines += [f"  {kind}: {made!r}" for kind, made in self.modules.items()]
        lines += [f"  as it is, {n} calls: {why}" for why, n in self.as_it_is.items()]
        lines += [f"  outside full graphs, {n} steps: {why}" for why, n in self.outside.items()]
        return "\n".join(lines)


def served(way: Way) -> Served:
    """How ``way`` serves its model so far."""
    not_flat = "" if way.not_flat is None else _said(way.not_flat)
    static = way.serving.static if isinstance(way, FlatWay) else None
    outside = {} if static is None else dict(static.outside)
    return Served(way.name, not_flat, way.modules(), dict(way.as_it_is), outside)
