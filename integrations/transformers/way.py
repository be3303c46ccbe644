"""What both ways to serve a decoder have: its forward traced, its settings, and how it is kept.

An artifact holds the stitched modules, and beside them what the admission found, pickled.
"""

from __future__ import annotations

import inspect
import json
import os
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import transformers
from torch import nn

from piecework.errors import ArtifactError, CaptureError
from piecework.integrations.transformers.probe import Forward
from piecework.integrations.transformers.settings import ConfigReader, embedding_of
from piecework.runtime.artifact.model import Artifact, Part, files_of, write_models
from piecework.runtime.config.compilation import CompilationConfig
from piecework.runtime.stitched import StitchedModule
from piecework.runtime.store.package import Place
from piecework.runtime.store.surroundings import source_factors, tree_digest

LOADER, SAVER = (f"piecework.integrations.transformers.{name}" for name in ("load", "save"))
AGAIN = "build the model as it was saved, or stitch it with artifact=path, which compiles it again"
ENCODER = "encoder"
#: The file of an artifact that holds what admissions found: JSON has no classes and dtypes.
FOUND = "found.pickle"
#: Fields that say where a model came from, are read in each call, or are compared by the weights.
_NO_EFFECT = (
    *("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"),
    *("use_cache", "return_dict", "output_hidden_states", "output_attentions"),
)


class TracedForward(nn.Module):
    """The decoder's own forward, for a trace of it in some form."""

    def __init__(self, decoder: nn.Module, forward: Forward) -> None:
        super().__init__()
        self.model = decoder
        # Unbound where it is the decoder's own, so that weights are named by way of ``self.model``.
        own = inspect.ismethod(forward) and forward.__self__ is decoder
        self._function = forward.__func__ if own else None
        self._bound = None if own else forward

    def output(self, **given: object) -> Any:
        if self._function is not None:
            return self._function(self.model, **given, return_dict=True)
        return self._bound(**given, return_dict=True)  # type: ignore[misc]


class Subject(NamedTuple):
    """What is served: a decoder, part of a model, stitched by a configuration."""

    model: nn.Module
    decoder: nn.Module
    config: CompilationConfig | None

    def refused(self, why: str, hint: str) -> CaptureError:
        return CaptureError(why, where=type(self.decoder).__name__, hint=hint)


class Way:
    """A decoder whose forwards are served by stitched functions."""

    name: ClassVar[str]

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.model, self.decoder, self.config = subject
        self.forward: Forward = self.decoder.forward  # the decoder's own
        weight = embedding_of(self.decoder)
        self.dtype, self.device = weight.dtype, weight.device
        self.settings = ConfigReader(self.decoder.config)
        self.accepted = frozenset(inspect.signature(self.forward).parameters)
        self.not_flat = ""  # why it is not served flat, if that was tried
        self.encoder: Way | str | None = None  # the one beside it, or why it is not served
        self.as_it_is: Counter[str] = Counter()  # calls of the decoder's own forward, by reason
        self.compiling = threading.RLock()  # while something is compiled or saved

    def ways(self) -> list[Way]:
        """This one, and that of the encoder if it has one."""
        return [self, self.encoder] if isinstance(self.encoder, Way) else [self]

    def calls_as_they_are(self) -> dict[str, int]:
        """Calls that the model's own forwards served, by the reason."""
        mine, *encoder = (each.as_it_is for each in self.ways())
        return dict(mine) | {f"{ENCODER}: {why}": n for c in encoder for why, n in c.items()}

    @cached_property
    def kept(self) -> dict[str, Any]:
        """What a manifest says of the modules that serve the decoder, as JSON reads it back."""
        of = _surroundings(self.subject)
        return {"load": LOADER, "save": SAVER, "way": self.name, "of": of}

    def adopt(self, made: StitchedModule, part: Artifact) -> None:
        """Serve by what an artifact has; raises `ArtifactError` where it does not fit."""
        made.require_made_so(part, (), {})
        made.take(part)


def save_ways(ways: Sequence[Any], place: Place, key_file: str | os.PathLike[str] | None) -> None:
    """Write what serves a decoder, and the encoder beside it; raises `ArtifactError`."""
    with ExitStack() as stack:
        for each in ways:
            stack.enter_context(each.compiling)
        made = [module for each in ways for module in each.kept_modules()]
        if not made:
            where = type(ways[0].decoder).__name__
            raise ArtifactError("nothing is compiled", where=where, hint="call it first")
        parts: list[Part] = [stack.enter_context(each.saved()) for each in made]
        found = [each.found() for each in ways]
        write_models(place, parts, parts[0].settings, {FOUND: found}, key_file=key_file)


def require_like(kept: Mapping[str, Any], subject: Subject) -> None:
    """Raise `ArtifactError` at the first difference of a model from the saved one."""
    before, now = kept["of"], _surroundings(subject)
    for name in sorted(before.keys() | now.keys()):
        was, is_now = (repr(each.get(name))[:99] for each in (before, now))
        if before.get(name) != now.get(name):
            why = f"{name} was {was} when the model was saved and is {is_now} now"
            raise ArtifactError(why, hint=AGAIN)


def _surroundings(subject: Subject) -> dict[str, Any]:
    """What a saved model and another one have to have alike, as JSON reads it back."""
    config = subject.decoder.config
    fields = {k: v for k, v in config.to_dict().items() if k not in _NO_EFFECT}
    kinds = [type(subject.model), type(subject.decoder)]
    of = {
        "transformers": transformers.__version__,
        "the integration": tree_digest(Path(__file__).parent),
        "class": [f"{each.__module__}.{each.__qualname__}" for each in kinds],
        "source": source_factors(files_of(kinds)),
        "attention": config._attn_implementation,
        "experts": getattr(config, "_experts_implementation", None),
        **{f"config.{name}": value for name, value in fields.items()},
    }
    data: dict[str, Any] = json.loads(json.dumps(of, default=repr))
    return data
