"""The whole way: one stitched forward for each kind of call, compared with the model's own first.

A kind that can't be compiled, or would differ, is served by the model's own forward, and counted.
"""

from __future__ import annotations

import copy
import inspect
import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache

from piecework.errors import ArtifactError, CaptureError, InputError, PieceworkError, UsageError
from piecework.integrations.transformers.own.cache_state import (
    TakenApart,
    layers_of,
    put_back,
    take_apart,
)
from piecework.integrations.transformers.own.keeping import SAVER, kept_of, require_like
from piecework.integrations.transformers.own.probe import (
    HINT,
    Forward,
    embedding_of,
    require_same_cache,
    require_same_output,
)
from piecework.integrations.transformers.own.refusals import (
    INERT,
    RECORDED,
    ConfigReader,
    Settings,
    refuse_call,
    refuse_model,
    tokens_of,
)
from piecework.integrations.transformers.whole.forward import CallKind, Form, Given, Habits, wholly
from piecework.runtime import torch_compat
from piecework.runtime.artifact.load import Artifact
from piecework.runtime.artifact.save import Part, save_together
from piecework.runtime.artifact.values import from_bytes
from piecework.runtime.config.compilation import CompilationConfig
from piecework.runtime.stitched import StitchedModule
from piecework.runtime.store.folder import Place

_log = logging.getLogger(__name__)

#: A kind of call that needs more traces seems to need one for each length, and is left as it is.
MAX_TRACES = 6
UNROLLED = "a graph of it holds for one length alone, and each other one would be compiled anew"
_OTHER = "no graph of it serves these sizes or strides"

#: So many kinds of calls are compiled.
MAX_KINDS = 32

ENCODER = "encoder"
#: The file of an artifact that holds the kinds of calls: JSON has no classes and dtypes.
_KINDS = "kinds.pickle"

# Told apart by name: what a call asks of its output, and whether of a cache.
_SETTLED = ("use_cache", *INERT, *RECORDED)

Run = Callable[..., tuple[dict[str, object], bool, list[dict[str, object]]]]


@dataclass(slots=True)
class Call:
    """One forward: its kind, its tensors by name, and its cache, taken apart."""

    kind: CallKind
    tensors: Given
    cache: Cache | None
    taken: TakenApart | None

    def run(self, run: Run, habits: Habits) -> dict[str, object]:
        """The output's fields, the cache among them if it is one."""
        leaves = [] if self.taken is None else self.taken.leaves
        fields, returned, held = run(self.tensors, leaves)
        if self.cache is not None and self.taken is not None:
            put_back(self.cache, self.taken, held)
        if returned and habits.cache_name is not None:
            fields[habits.cache_name] = self.cache
        return fields


class WholeWay:
    """A decoder served whole, and the encoder beside it if there is one.

    Args:
        model: what was stitched.
        decoder: the module whose forward is replaced.
        forward: that forward, bound.
        habits: what running it showed.
        config: handed to ``piecework.compile``.

    Attributes:
        not_flat: why it is not served flat, if that was tried.
        encoder: serves the encoder beside it, or says why its own forward does.
        own_calls: calls that the decoder's own forward served, by the reason.
    """

    name = "whole"

    def __init__(
        self,
        model: nn.Module,
        decoder: nn.Module,
        forward: Forward,
        habits: Habits,
        config: CompilationConfig | None,
    ) -> None:
        self.decoder = decoder
        self.forward = forward
        self.habits = habits
        self.not_flat: CaptureError | None = None
        self.encoder: WholeWay | str | None = None
        self.own_calls: Counter[str] = Counter()
        self._model = model
        self._config = config
        self._accepted = frozenset(inspect.signature(forward).parameters)
        weight = embedding_of(decoder)
        self._dtype, self._device = weight.dtype, weight.device
        self._settings = ConfigReader(decoder.config)
        self._kinds: dict[CallKind, StitchedModule | str] = {}
        self._unrolled: set[bool] = set()
        self._compiling = threading.RLock()
        self._counting = threading.Lock()

    # --- calls -----------------------------------------------------------------------------------

    def serve(self, given: Mapping[str, object]) -> object:
        """One forward, its arguments by name.

        Raises:
            InputError: the arguments ask for what a stitched decoder can't give.
        """
        settings = self._settings.now()
        call = self.call_of(given, settings)
        stitched = self._kinds.get(call.kind)
        if stitched is None:
            stitched = self._stitched(call, given)
        if isinstance(stitched, str):
            return self._own(given, stitched)
        try:
            with torch.no_grad() if torch.is_grad_enabled() else nullcontext():
                fields = call.run(stitched, self.habits)
        except InputError as error:
            if error.refused_by is None:  # else its arguments were, before anything ran
                raise
            return self._own(given, _OTHER)
        if len(stitched.traces) > MAX_TRACES:
            self._leave(call.kind, UNROLLED)
        return settings.returned(self.habits.output_class(**fields), given)

    def _own(self, given: Mapping[str, object], why: str) -> object:
        with self._counting:
            self.own_calls[why] += 1
        return self.forward(**given)

    def call_of(self, given: Mapping[str, object], settings: Settings | None = None) -> Call:
        """What ``given`` asks for.

        Raises:
            InputError: it asks for what a stitched decoder can't give.
        """
        settings = settings or self._settings.now()
        cache_name = self.habits.cache_name
        tensors: Given = {}
        flags: dict[str, bool] = {}
        strange = []
        for name, value in sorted(given.items()):
            if isinstance(value, torch.Tensor) and name in self._accepted and name != cache_name:
                tensors[name] = value.contiguous()
            elif isinstance(value, dict) and name in self._accepted and _is_table(value):
                tensors[name] = {
                    key: None if each is None else each.contiguous() for key, each in value.items()
                }
            elif isinstance(value, bool) and name in self._accepted and name not in _SETTLED:
                flags[name] = value
            elif value is not None and name not in (cache_name, *_SETTLED):
                strange.append(name)
        refuse_call(self.decoder, given, settings, strange)
        _, tokens = tokens_of(self.decoder, given, self._dtype, self._device)
        asked = given.get("use_cache")
        use_cache = bool(settings.use_cache if asked is None else asked)
        if "use_cache" in self._accepted:
            flags["use_cache"] = use_cache
        cache = None if cache_name is None else given.get(cache_name)
        if cache is None and self.habits.makes_cache and use_cache:
            cache = self._new_cache()
        if isinstance(cache, EncoderDecoderCache) and not self.habits.is_pair:
            raise InputError(
                "past_key_values is an EncoderDecoderCache, and this is no encoder-decoder",
                where="past_key_values",
                hint="pass a DynamicCache",
            )
        taken = None if cache is None else take_apart(cache, self.habits.counts)  # type: ignore[arg-type]
        kind = CallKind(
            tensors=tuple((name, _form(each)) for name, each in tensors.items()),
            flags=tuple(sorted(flags.items())),
            cache=None if taken is None else taken.form,
            one=(tokens.shape[0] == 1, tokens.shape[1] == 1),
            implementation=settings.implementation,
        )
        return Call(kind, tensors, cache, taken)  # type: ignore[arg-type]

    def _new_cache(self) -> Cache:
        config = self.decoder.config
        if self.habits.is_pair:
            return EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))
        return DynamicCache(config=config)

    # --- kinds of calls --------------------------------------------------------------------------

    def _stitched(self, call: Call, given: Mapping[str, object]) -> StitchedModule | str:
        """What serves calls of this kind from now on, or why the model's own forward does."""
        switch = torch_compat.compiler_off()
        if switch is not None:
            return switch
        with self._compiling:
            if call.kind not in self._kinds:
                if len(self._kinds) >= MAX_KINDS:
                    return f"more than {MAX_KINDS} kinds of calls"
                if self.is_left(call.kind):
                    return UNROLLED
                try:
                    self.compile(call.kind, given)
                except PieceworkError as error:
                    self._leave(call.kind, error.message)
            return self._kinds[call.kind]

    def _leave(self, kind: CallKind, why: str) -> None:
        """Let the model's own forward serve calls of ``kind`` from now on."""
        name = type(self.decoder).__name__
        _log.warning("%s runs as it is for %s: %s", name, kind.describe(), why)
        self._kinds[kind] = why

    def leave_tokens(self, kind: CallKind) -> None:
        """Let the model's own forward serve ``kind``, and all others of one token, or of several."""
        self._leave(kind, UNROLLED)
        self._unrolled.add(kind.one[1])

    def is_left(self, kind: CallKind) -> bool:
        """Whether calls of ``kind`` are left as they are for their number of tokens."""
        return kind.one[1] in self._unrolled

    def serving(self, kind: CallKind) -> StitchedModule | None:
        """What was compiled for ``kind``."""
        made = self._kinds.get(kind)
        return None if isinstance(made, str) else made

    def compile(self, kind: CallKind, given: Mapping[str, object]) -> StitchedModule:
        """Compile for calls of ``kind``, of which ``given`` is one, and compare with the model's
        own.

        Raises:
            CaptureError: it can't be captured, or gives another result.
        """
        own = self.own_result(given)
        kept = kept_of(self._model, self.decoder, save=SAVER, way=self.name)
        stitched = self._wholly(kind, held_names(own[1]), kept)
        self.require_same(stitched, given, own, compiled=True)
        self._kinds[kind] = stitched
        return stitched

    def _wholly(
        self, kind: CallKind, held: tuple[str, ...], kept: Mapping[str, object]
    ) -> StitchedModule:
        name = self.habits.cache_name
        return wholly(self.decoder, self.forward, kind, name, held, self._config, kept)

    def own_result(self, given: Mapping[str, object]) -> tuple[Any, object]:
        """The model's own output, and the cache afterwards; ``given`` is left as it is."""
        own = self._copied(given)
        with torch.no_grad():
            output = self.forward(**{**own, "return_dict": True})
        name = self.habits.cache_name
        cache = None if name is None else own.get(name)
        if cache is None and name is not None:
            cache = output.get(name)  # type: ignore[attr-defined]
        return output, cache

    def _copied(self, given: Mapping[str, object]) -> dict[str, object]:
        name = self.habits.cache_name
        return {key: copy.deepcopy(value) if key == name else value for key, value in given.items()}

    def require_same(
        self, run: Run, given: Mapping[str, object], own: tuple[Any, object], *, compiled: bool
    ) -> None:
        """Raise `CaptureError` where ``run`` gives another result or cache than ``own``."""
        with torch.no_grad():
            call = self.call_of(self._copied(given))
            fields = call.run(run, self.habits)
        expected, theirs = own
        compiled = compiled and getattr(self._config, "backend", None) != "eager"
        if type(expected) is not self.habits.output_class:
            self._refuse(f"its forward returns a {type(expected).__name__}, unlike before")
        require_same_output(fields, expected, compiled=compiled)
        if call.cache is not None and isinstance(theirs, Cache):
            require_same_cache(call.cache, theirs, self.habits.counts, compiled=compiled)
        elif call.cache is not theirs:
            made = "no" if theirs is None else "a"
            self._refuse(f"its own forward makes {made} cache, unlike before")

    def _refuse(self, why: str) -> None:
        raise CaptureError(why, where=type(self.decoder).__name__, hint=HINT)

    # --- what is there ---------------------------------------------------------------------------

    def ways(self) -> list[WholeWay]:
        """This one, and that of the encoder if it has one."""
        return [self, self.encoder] if isinstance(self.encoder, WholeWay) else [self]

    @property
    def as_it_is(self) -> Counter[str]:
        """Calls that the model's own forwards served, by the reason."""
        own, *encoder = (each.own_calls for each in self.ways())
        return own + Counter({f"{ENCODER}: {why}": n for c in encoder for why, n in c.items()})

    def entry(self, name: str) -> StitchedModule:
        """The first kind of call that was compiled; for ``decode`` of one token with a past."""
        if name == ENCODER and isinstance(self.encoder, WholeWay):
            return self.encoder.entry("input_ids")
        for kind, made in list(self._kinds.items()):
            if not isinstance(made, str) and (
                name == "input_ids" or (name == "decode" and kind.is_step)
            ):
                return made
        why = f": {self.encoder}" if name == ENCODER and self.encoder else ""
        raise UsageError(
            f"there is no entry {name!r}{why}",
            where="entry",
            hint="input_ids or decode, once it ran",
        )

    def is_compiled(self, given: Mapping[str, object]) -> bool:
        """Whether calls like this one run what is compiled already."""
        return bool(self._kinds)

    def modules(self) -> dict[str, StitchedModule]:
        """What is compiled, by the calls that it serves."""
        found: dict[str, StitchedModule] = {}
        for each in self.ways():
            of = "" if each is self else f"{ENCODER}: "
            for kind, made in list(each._kinds.items()):
                if not isinstance(made, str):
                    name = f"{of}{kind.describe()}"
                    found[name if name not in found else f"{name} ({len(found)})"] = made
        return found

    # --- artifacts -------------------------------------------------------------------------------

    def save(self, place: Place, key_file: str | os.PathLike[str] | None) -> None:
        """Write what serves every kind of call that came so far.

        Raises:
            ArtifactError: nothing is compiled, or as `StitchedModule.save`.
        """
        with ExitStack() as stack:
            parts: list[Part] = []
            values = [each._values(stack, parts) for each in self.ways()]
            if len(values) == 1 and self.encoder is not None:
                values.append(self.encoder)
            settings = parts[0].settings  # alike in all parts
            save_together(place, parts, settings, {_KINDS: values}, key_file=key_file)

    def _values(self, stack: ExitStack, parts: list[Part]) -> object:
        """What was found out; the modules are put to ``parts``, and held still until ``stack``
        ends.
        """
        stack.enter_context(self._compiling)
        kinds: list[object] = []
        before = len(parts)
        for kind, made in self._kinds.items():
            if isinstance(made, str):
                kinds.append((kind, (), made))
            else:
                kinds.append((kind, made.model.held, None))
                parts.append(stack.enter_context(made.saved()))
        if len(parts) == before:
            raise ArtifactError(
                "nothing is compiled", where=type(self.decoder).__name__, hint="call it first"
            )
        refused = self.not_flat
        not_flat = None if refused is None else (refused.message, refused.where, refused.hint)
        return self.habits, kinds, frozenset(self._unrolled), not_flat

    @classmethod
    def of_artifact(
        cls, found: Artifact, model: nn.Module, decoder: nn.Module, config: CompilationConfig | None
    ) -> WholeWay:
        """The way that `save` wrote, for a model like the one that it was admitted for.

        Raises:
            ArtifactError: it does not fit.
            CaptureError: the model is not fit, such as one in training mode.
        """
        values: Any = from_bytes(found.folder.read(_KINDS), _KINDS)
        parts = iter(found.parts())
        way = cls._of_values(values[0], parts, model, decoder, config)
        if values[1:] and isinstance(values[1], str):
            (way.encoder,) = values[1:]
        elif values[1:]:
            encoder = encoder_of(model, decoder)
            if encoder is None:
                raise ArtifactError(
                    "the artifact is of a model with an encoder", where=type(model).__name__
                )
            way.encoder = cls._of_values(values[1], parts, model, encoder, config)
        return way

    @classmethod
    def _of_values(
        cls,
        values: Any,
        parts: Iterator[Artifact],
        model: nn.Module,
        decoder: nn.Module,
        config: CompilationConfig | None,
    ) -> WholeWay:
        refuse_model(decoder)
        habits, kinds, unrolled, not_flat = values
        way = cls(model, decoder, decoder.forward, habits, config)
        way._unrolled = set(unrolled)
        if not_flat is not None:
            message, where, hint = not_flat
            way.not_flat = CaptureError(message, where=where, hint=hint)
        for kind, held, why in kinds:
            if why is not None:
                way._kinds[kind] = why
                continue
            part = next(parts)
            require_like(part.folder.facts["kept"], model, decoder)  # type: ignore[arg-type]
            made = way._wholly(kind, held, part.folder.facts["kept"])  # type: ignore[arg-type]
            made.require_made_so(part, (), {})
            made.take(part)
            way._kinds[kind] = made
        return way


def held_names(cache: object) -> tuple[str, ...]:
    """The attributes that the layers of a cache have."""
    return tuple(sorted({name for layer in layers_of(cache) for name in vars(layer)}))


def encoder_of(model: nn.Module, decoder: nn.Module) -> nn.Module | None:
    """The encoder beside a decoder; None if transformers knows none."""
    found = model.get_encoder()  # type: ignore[operator]
    return None if found is decoder or found is model else found


def _is_table(value: Mapping[object, object]) -> bool:
    return all(
        isinstance(key, str) and (each is None or isinstance(each, torch.Tensor))
        for key, each in value.items()
    )


def _form(value: torch.Tensor | Mapping[str, torch.Tensor | None]) -> Form:
    if isinstance(value, torch.Tensor):
        return value.dtype, value.ndim
    return tuple((key, None if each is None else _form(each)) for key, each in value.items())
