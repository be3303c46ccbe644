"""The whole way. In: a decoder that the flat way refused. Out: forwards of it by stitched functions of the whole forward, one for each kind of call, each compared with the model's own before it serves.

A kind of call that can't be compiled, or would differ, is served by the model's own forward, and counted.
"""

from __future__ import annotations

import copy
import inspect
import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass

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
from piecework.integrations.transformers.own.outside import require_same_outside
from piecework.integrations.transformers.own.probe import Forward, embedding_of
from piecework.integrations.transformers.own.refusals import (
    INERT,
    refuse_call,
    refuse_model,
    tokens_of,
)
from piecework.integrations.transformers.own.sameness import require_same_cache, require_same_output
from piecework.integrations.transformers.own.settings import RECORDED, ConfigReader, Settings
from piecework.integrations.transformers.whole.forward import CallKind, Form, Given, Habits, wholly
from piecework.integrations.transformers.whole.keeping import KINDS, KeptKind, KeptWay, kept_of
from piecework.runtime import torch_compat
from piecework.runtime.artifact.load import Artifact
from piecework.runtime.artifact.save import Part, save_together
from piecework.runtime.artifact.values import from_bytes
from piecework.runtime.config.compilation import CompilationConfig
from piecework.runtime.stitched import StitchedModule
from piecework.runtime.store.folder import Place

_log = logging.getLogger(__name__)

#: A kind of call that needs more traces than this is left to the model's own forward, for each length seems to need one of its own.
MAX_TRACES = 6
UNROLLED = "a graph of it holds for one length alone, and each other one would be compiled anew"
_OTHER = "no graph of it serves these sizes or strides"

#: So many kinds of calls are compiled; further ones are served by the model's own forward.
MAX_KINDS = 32

# Told apart by name: what a call asks of its output, and whether of a cache.
_SETTLED = ("use_cache", *INERT, *RECORDED)

Run = Callable[..., tuple[dict[str, object], bool, list[dict[str, object]]]]


@dataclass(frozen=True, slots=True)
class OwnResult:
    """What the model's own forward gives: its output, and the cache as it is afterwards."""

    output: object
    cache: object

    @property
    def held(self) -> tuple[str, ...]:
        """The attributes that the layers of the cache have."""
        return tuple(sorted({name for layer in layers_of(self.cache) for name in vars(layer)}))


@dataclass(slots=True)
class Call:
    """One forward: its kind, its tensors by name, and its cache, taken apart."""

    kind: CallKind
    tensors: Given
    cache: Cache | None
    taken: TakenApart | None

    def run(self, run: Run, habits: Habits) -> tuple[dict[str, object], Cache | None]:
        """The output's fields, the cache among them if it is one."""
        leaves = [] if self.taken is None else self.taken.leaves
        fields, returned, held = run(self.tensors, leaves)
        if self.cache is not None and self.taken is not None:
            put_back(self.cache, self.taken, held)
        if returned and habits.cache_name is not None:
            fields[habits.cache_name] = self.cache
        return fields, self.cache


class WholeWay:
    """A decoder served whole; see `piecework.integrations.transformers.way.Way`.

    Args:
        model: what was stitched.
        decoder: the module whose forward is replaced.
        forward: that forward, bound.
        habits: what running it showed.
        config: handed to ``piecework.compile``.

    Attributes:
        not_flat: why it is not served flat, if that was tried.
        as_it_is: calls that the model's own forward served, by the reason.
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
        self._model = model
        self.decoder = decoder
        self.forward = forward
        self.habits = habits
        self.not_flat: CaptureError | None = None
        self.as_it_is: Counter[str] = Counter()
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
        """One forward.

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
                fields, _ = call.run(stitched, self.habits)
        except InputError as error:
            if error.refused_by is None:  # else its arguments were, before anything ran
                raise
            return self._own(given, _OTHER)
        if len(stitched.traces) > MAX_TRACES:
            self._leave(call.kind, UNROLLED)
        output = self.habits.output_class(**fields)
        asked = given.get("return_dict")
        return output if (settings.return_dict if asked is None else asked) else output.to_tuple()  # type: ignore[attr-defined]

    def _own(self, given: Mapping[str, object], why: str) -> object:
        with self._counting:
            self.as_it_is[why] += 1
        return self.forward(**given)

    def call_of(self, given: Mapping[str, object], settings: Settings) -> Call:
        """What ``given`` asks for.

        Raises:
            InputError: it asks for what a stitched decoder can't give.
        """
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
        """Let the model's own forward serve calls of ``kind``, and all others that are of one token, or of more than one, as it is."""
        self._leave(kind, UNROLLED)
        self._unrolled.add(kind.one[1])

    def is_left(self, kind: CallKind) -> bool:
        """Whether calls of ``kind`` are left to the model's own forward because of their number of tokens."""
        return kind.one[1] in self._unrolled

    def kind_of(self, given: Mapping[str, object]) -> CallKind:
        """What kind of call ``given`` is."""
        return self.call_of(given, self._settings.now()).kind

    def serving(self, kind: CallKind) -> StitchedModule | None:
        """What was compiled for ``kind``."""
        made = self._kinds.get(kind)
        return None if isinstance(made, str) else made

    def compile(self, kind: CallKind, given: Mapping[str, object]) -> StitchedModule:
        """Capture and compile the forward for calls of ``kind``, of which ``given`` is one, and compare it with the model's own.

        Raises:
            CaptureError: it can't be captured, or gives another result; the other errors of ``piecework.compile``.
        """
        own = self.own_result(given)
        stitched = self._wholly(kind, own.held, kept_of(self._model, self.decoder))
        self.require_same(stitched, given, own, compiled=True)
        self._kinds[kind] = stitched
        return stitched

    def _wholly(
        self, kind: CallKind, held: Sequence[str], kept: Mapping[str, object]
    ) -> StitchedModule:
        name = self.habits.cache_name
        return wholly(self.decoder, self.forward, kind, name, held, self._config, kept)

    def own_result(self, given: Mapping[str, object]) -> OwnResult:
        """What the model's own forward gives. ``given`` is left as it is."""
        own = self._copied(given)
        with torch.no_grad():
            output = self.forward(**{**own, "return_dict": True})
        name = self.habits.cache_name
        cache = None if name is None else own.get(name)
        if cache is None and name is not None:
            cache = output.get(name)  # type: ignore[attr-defined]
        return OwnResult(output, cache)

    def _copied(self, given: Mapping[str, object]) -> dict[str, object]:
        name = self.habits.cache_name
        return {key: copy.deepcopy(value) if key == name else value for key, value in given.items()}

    def require_same(
        self, run: Run, given: Mapping[str, object], own: OwnResult, *, compiled: bool
    ) -> None:
        """Raise `CaptureError` where ``run`` gives another result, or leaves another cache, than ``own``. ``given`` is left as it is."""
        with torch.no_grad():
            call = self.call_of(self._copied(given), self._settings.now())
            fields, cache = call.run(run, self.habits)
        expected, theirs = own.output, own.cache
        compiled = compiled and getattr(self._config, "backend", None) != "eager"
        if type(expected) is not self.habits.output_class:
            raise CaptureError(
                f"its forward returns a {type(expected).__name__}, and returned a {self.habits.output_class.__name__} before",
                where=type(self.decoder).__name__,
                hint="leave this model unstitched",
            )
        require_same_output(fields, expected, compiled=compiled)
        if cache is not None and isinstance(theirs, Cache):
            require_same_cache(cache, theirs, self.habits.counts, compiled=compiled)
        elif cache is not theirs:
            raise CaptureError(
                f"its own forward makes {'no' if theirs is None else 'a'} cache, unlike before",
                where=type(self.decoder).__name__,
                hint="leave this model unstitched",
            )

    # --- artifacts -------------------------------------------------------------------------------

    def save(self, place: Place, key_file: str | os.PathLike[str] | None) -> None:
        """Write what serves every kind of call that came so far.

        Raises:
            ArtifactError: as `StitchedModule.save`.
        """
        with ExitStack() as stack:
            found, parts = self.kept(stack)
            values, settings = {KINDS: found.values()}, parts[0].settings  # alike in all parts
            save_together(place, parts, settings, values, key_file=key_file)

    def kept(self, stack: ExitStack) -> tuple[KeptWay, list[Part]]:
        """What an artifact says of the kinds of calls that came so far, and their modules, which are held still until ``stack`` ends.

        Raises:
            ArtifactError: there is none, or as `StitchedModule.save`.
        """
        stack.enter_context(self._compiling)
        kinds, parts = [], []
        for kind, made in self._kinds.items():
            if isinstance(made, str):
                kinds.append(KeptKind(kind, (), made))
            else:
                kinds.append(KeptKind(kind, made.model.held, None))
                parts.append(stack.enter_context(made.saved()))
        if not parts:
            raise ArtifactError(
                "nothing is compiled", where=type(self.decoder).__name__, hint="call it first"
            )
        refused = self.not_flat
        not_flat = None if refused is None else (refused.message, refused.where, refused.hint)
        return KeptWay(self.habits, kinds, frozenset(self._unrolled), not_flat), parts

    @classmethod
    def of_artifact(
        cls,
        found: Artifact,
        model: nn.Module,
        decoder: nn.Module,
        config: CompilationConfig | None,
    ) -> WholeWay:
        """The way that `save` wrote, for a model like the one that it was admitted for.

        Raises:
            ArtifactError: it does not fit.
            CaptureError: the model is not fit, such as one in training mode.
        """
        was = KeptWay.of_values(from_bytes(found.folder.read(KINDS), KINDS))
        return cls.of_kept(was, iter(found.parts()), model, decoder, config)

    @classmethod
    def of_kept(
        cls,
        was: KeptWay,
        parts: Iterator[Artifact],
        model: nn.Module,
        decoder: nn.Module,
        config: CompilationConfig | None,
    ) -> WholeWay:
        """The way of which `kept` said ``was``.

        Args:
            parts: its modules; those that follow are left.

        Raises:
            ArtifactError: it does not fit.
            CaptureError: the model is not fit, such as one in training mode.
        """
        refuse_model(decoder)
        kept = kept_of(model, decoder)
        way = cls(model, decoder, decoder.forward, was.habits, config)
        way._unrolled = set(was.unrolled)
        if was.not_flat is not None:
            message, where, hint = was.not_flat
            way.not_flat = CaptureError(message, where=where, hint=hint)
        for each in was.kinds:
            if each.why is not None:
                way._kinds[each.kind] = each.why
                continue
            part, made = next(parts), way._wholly(each.kind, each.held, kept)
            require_same_outside(part.folder.facts["kept"]["of"], kept["of"])  # type: ignore[index, arg-type]
            made.require_made_so(part, (), {})
            made.take(part)
            way._kinds[each.kind] = made
        return way

    def entry(self, name: str) -> StitchedModule:
        """The stitched module behind ``input_ids``: the first kind of call that was compiled; behind ``decode``: the first of one token with a past."""
        for kind, made in list(self._kinds.items()):
            if not isinstance(made, str) and (
                name == "input_ids" or (name == "decode" and kind.is_step)
            ):
                return made
        raise UsageError(
            f"there is no entry {name!r}", where="entry", hint="input_ids or decode, once it ran"
        )

    def is_compiled(self, given: Mapping[str, object]) -> bool:
        return bool(self._kinds)

    def modules(self) -> dict[str, StitchedModule]:
        found: dict[str, StitchedModule] = {}
        for kind, made in list(self._kinds.items()):
            if not isinstance(made, str):
                name = kind.describe()
                found[name if name not in found else f"{name} ({len(found)})"] = made
        return found


def _is_table(value: Mapping[object, object]) -> bool:
    return all(
        isinstance(key, str) and (each is None or isinstance(each, torch.Tensor))
        for key, each in value.items()
    )


def _form(value: torch.Tensor | Mapping[str, torch.Tensor | None]) -> Form:
    if isinstance(value, torch.Tensor):
        return value.dtype, value.ndim
    return tuple((key, None if each is None else _form(each)) for key, each in value.items())
