"""The whole way: one stitched forward for each kind of call, compared with the model's own first.

A kind that can't be compiled, or would differ, is served by the model's own forward, and counted.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache

from piecework.errors import InputError, PieceworkError, UsageError
from piecework.integrations.transformers import settings as reading
from piecework.integrations.transformers.probe import HINT, Forward, require_same
from piecework.integrations.transformers.request import cache_state
from piecework.integrations.transformers.way import ENCODER, Subject, TracedForward, Way
from piecework.runtime import torch_compat
from piecework.runtime.artifact.model import Artifact
from piecework.runtime.compile import compile_with_mode
from piecework.runtime.stitched import StitchedModule
from piecework.runtime.trace.dynamic_dims import Marks
from piecework.runtime.trace.sizes import AllDimensions

_log = logging.getLogger(__name__)

#: A kind of call that needs more traces is left as it is.
MAX_TRACES = 6
UNROLLED = "a graph of it holds for one length alone, and each other one would be compiled anew"
#: So many kinds of calls are compiled.
MAX_KINDS = 32
# Told apart by name: what a call asks of its output, and whether of a cache.
_SETTLED = ("use_cache", *reading.INERT, *reading.RECORDED)


Fields = dict[str, object]
Held = list[dict[str, object]]
#: Arguments of a call: tensors by name, and tables of them, such as a mask for each type of layer.
Given = dict[str, torch.Tensor | dict[str, torch.Tensor | None]]
#: Dtype and number of dimensions of a tensor; of a table those of its entries, by their keys.
Form = tuple[torch.dtype, int] | tuple[tuple[str, tuple[torch.dtype, int] | None], ...]


@dataclass(frozen=True, slots=True)
class CallKind:
    """What calls have in common that traces which differ in sizes alone can serve."""

    tensors: tuple[tuple[str, Form], ...]
    flags: tuple[tuple[str, object], ...]  # the other arguments
    cache: cache_state.CacheForm | None
    one: tuple[bool, bool]  # one sequence, one token of each: such have traces of their own
    implementation: str  # the attention function's name

    def describe(self) -> str:
        """In words, for reports."""
        names = ", ".join(name for name, _ in self.tensors)
        rows = "one sequence" if self.one[0] else "sequences"
        tokens = "one token each" if self.one[1] else "tokens"
        cache = "no cache" if self.cache is None else self.cache.kind.__name__
        empty = "" if self.cache is None or self.cache.is_filled else ", empty"
        return f"{rows} of {tokens}, {cache}{empty}: {names}"

    @property
    def is_step(self) -> bool:
        """Whether a call is one more token of sequences whose past is in a cache."""
        return self.one[1] and self.cache is not None and self.cache.is_filled


@dataclass(frozen=True, slots=True)
class Habits:
    """What running a decoder showed."""

    cache_name: str | None  # the argument and field that a KV cache is, if it takes one
    makes_cache: bool  # where none is given
    counts: frozenset[str]  # attributes of the cache's layers, integers that grow
    output_class: type
    is_pair: bool = False  # the cache is one of an encoder-decoder


@dataclass(slots=True)
class WholeCall:
    """One forward: its kind, its tensors by name, and its cache, taken apart."""

    kind: CallKind
    tensors: Given
    cache: Cache | None
    taken: cache_state.TakenApart | None

    def run(self, run: Forward, habits: Habits) -> Fields:
        """The output's fields, the cache among them if it is one."""
        leaves = [] if self.taken is None else self.taken.leaves
        fields, returned, held = run(self.tensors, leaves)  # type: ignore[misc]
        if self.cache is not None and self.taken is not None:
            cache_state.put_back(self.cache, self.taken, held)
        if returned and habits.cache_name is not None:
            fields[habits.cache_name] = self.cache
        return fields


class WholeForward(TracedForward):
    """The decoder's forward for one kind of call; ``held``: what the cache's layers have then."""

    def __init__(
        self,
        decoder: nn.Module,
        forward: Forward,
        kind: CallKind,
        cache_name: str | None,
        held: Sequence[str],
    ) -> None:
        super().__init__(decoder, forward)
        self._flags = dict(kind.flags)
        self._form = kind.cache
        self._cache_name = cache_name
        self.held = tuple(held)

    def forward(self, given: Given, leaves: Sequence[torch.Tensor]) -> tuple[Fields, bool, Held]:
        """The output's fields beside its cache, whether that is one of them, and what it holds."""
        arguments = {**given, **self._flags}
        cache = None
        if self._form is not None:
            cache = cache_state.rebuilt(self._form, leaves)
            arguments[self._cache_name] = cache
        fields = {}
        returned = False
        for name, value in self.output(**arguments).items():
            if cache is not None and value is cache:
                returned = True
            else:
                fields[name] = value
        return fields, returned, [] if cache is None else cache_state.held_by(cache, self.held)


class CallDimensions(AllDimensions):
    """Every size of a call may differ, and has a number behind it in a trace."""

    def every_size(self, args: Sequence[object], kwargs: Mapping[str, object]) -> Marks:
        return []

    def batch_alone(self, args: Sequence[object], kwargs: Mapping[str, object]) -> None:
        return None  # with the batch alone dynamic, each length would be compiled anew


class WholeWay(Way):
    """A decoder served whole, and the encoder beside it; ``habits``: what running it showed."""

    name = "whole"

    def __init__(self, subject: Subject, habits: Habits) -> None:
        super().__init__(subject)
        self.habits = habits
        self.kinds: dict[CallKind, StitchedModule | str] = {}
        self._counting = threading.Lock()

    def serve(self, given: Mapping[str, object]) -> object:
        """One forward, its arguments by name; raises `InputError` for what can't be served."""
        settings = self.settings.now()
        call = self.call_of(given, settings)
        stitched = self.kinds.get(call.kind)
        if stitched is None:
            stitched = self._stitched(call, given)
        if isinstance(stitched, str):
            return self._run_as_it_is(given, stitched)
        try:
            with torch.no_grad() if torch.is_grad_enabled() else nullcontext():
                fields = call.run(stitched, self.habits)
        except InputError as error:
            if error.places is None:  # else a size was refused, before anything ran
                raise
            return self._run_as_it_is(given, "no graph of it serves these sizes or strides")
        if len(stitched.traces) > MAX_TRACES:
            self.leave(call.kind, f"it needs more than {MAX_TRACES} traces")
        return settings.returned(self.habits.output_class(**fields), given)

    def _run_as_it_is(self, given: Mapping[str, object], why: str) -> object:
        with self._counting:  # not the lock that is held while something is compiled
            self.as_it_is[why] += 1
        return self.forward(**given)

    def call_of(
        self, given: Mapping[str, object], settings: reading.Settings | None = None
    ) -> WholeCall:
        """What ``given`` asks for; raises `InputError` where that can't be served."""
        settings = settings or self.settings.now()
        cache_name = self.habits.cache_name
        tensors: Given = {}
        flags: dict[str, bool] = {}
        strange = []
        for name, value in sorted(given.items()):
            if value is None or name == cache_name:
                continue
            taken_by_name = name in self.accepted
            if taken_by_name and isinstance(value, torch.Tensor):
                tensors[name] = value.contiguous()
            elif taken_by_name and isinstance(value, dict) and _is_table(value):
                tensors[name] = {
                    key: None if each is None else each.contiguous() for key, each in value.items()
                }
            elif name not in _SETTLED:
                if taken_by_name and isinstance(value, bool):
                    flags[name] = value
                else:
                    strange.append(name)
        reading.refuse_call(self.decoder, given, settings, strange)
        _, tokens = reading.tokens_of(self.decoder, given, self.dtype, self.device)
        asked = given.get("use_cache")
        use_cache = bool(settings.use_cache if asked is None else asked)
        if "use_cache" in self.accepted:
            flags["use_cache"] = use_cache
        cache = None if cache_name is None else given.get(cache_name)
        if cache is None and self.habits.makes_cache and use_cache:
            cache = DynamicCache(config=self.decoder.config)
            if self.habits.is_pair:
                cache = EncoderDecoderCache(cache, DynamicCache(config=self.decoder.config))
        if isinstance(cache, EncoderDecoderCache) and not self.habits.is_pair:
            why = "past_key_values is an EncoderDecoderCache, and this is no encoder-decoder"
            raise InputError(why, where="past_key_values", hint="pass a DynamicCache")
        taken = None if cache is None else cache_state.take_apart(cache, self.habits.counts)  # type: ignore[arg-type]
        kind = CallKind(
            tensors=tuple((name, _form(each)) for name, each in tensors.items()),
            flags=tuple(sorted(flags.items())),
            cache=None if taken is None else taken.form,
            one=(tokens.shape[0] == 1, tokens.shape[1] == 1),
            implementation=settings.implementation,
        )
        return WholeCall(kind, tensors, cache, taken)  # type: ignore[arg-type]

    def _stitched(self, call: WholeCall, given: Mapping[str, object]) -> StitchedModule | str:
        """What serves calls of this kind from now on, or why the model's own forward does."""
        switch = torch_compat.compiler_off()
        if switch is not None:
            return switch
        with self.compiling:
            if call.kind not in self.kinds:
                if len(self.kinds) >= MAX_KINDS:
                    return f"more than {MAX_KINDS} kinds of calls"
                if self.is_left(call.kind):
                    return UNROLLED
                try:
                    self.compile(call.kind, given)
                except PieceworkError as error:
                    self.leave(call.kind, error.message)
            return self.kinds[call.kind]

    def leave(self, kind: CallKind, why: str) -> None:
        """Let the model's own forward serve calls of ``kind`` from now on."""
        name = type(self.decoder).__name__
        _log.warning("%s runs as it is for %s: %s", name, kind.describe(), why)
        self.kinds[kind] = why

    def is_left(self, kind: CallKind) -> bool:
        """Whether calls of ``kind``, or with as many tokens, are unrolled."""
        return any(
            why == UNROLLED and each.one[1] == kind.one[1] for each, why in self.kinds.items()
        )

    def compile(self, kind: CallKind, given: Mapping[str, object]) -> StitchedModule:
        """Compile for calls like ``given``; raises `CaptureError` where results differ."""
        own = self.own_result(given)
        stitched = self._module_for(kind, held_names(own[1]))
        self.require_same(stitched, given, own, compiled=True)
        self.kinds[kind] = stitched
        return stitched

    def _module_for(self, kind: CallKind, held: tuple[str, ...]) -> StitchedModule:
        """The forward for calls of ``kind``, stitched at its first call, or by an artifact."""
        # The class's name labels the model in the emitted banner and in the report.
        named = type(type(self.decoder).__name__, (WholeForward,), {})
        return compile_with_mode(
            named(self.decoder, self.forward, kind, self.habits.cache_name, held),
            config=self.config,
            sizes=CallDimensions(),
            kept=self.kept,
            deferred=True,
        )

    def own_result(self, given: Mapping[str, object]) -> tuple[Any, object]:
        """The model's own output, and the cache afterwards; ``given`` is left as it is."""
        own, name = self._copied(given), self.habits.cache_name
        with torch.no_grad():
            output: Any = self.forward(**{**own, "return_dict": True})
        cache = None if name is None else own.get(name)
        if cache is None and name is not None:
            cache = output.get(name)
        return output, cache

    def _copied(self, given: Mapping[str, object]) -> dict[str, object]:
        name = self.habits.cache_name
        return {key: copy.deepcopy(value) if key == name else value for key, value in given.items()}

    def require_same(
        self, run: Forward, given: Mapping[str, object], own: tuple[Any, object], *, compiled: bool
    ) -> None:
        """Raise `CaptureError` where ``run`` gives another result or cache than ``own``."""
        with torch.no_grad():
            call = self.call_of(self._copied(given))
            fields = call.run(run, self.habits)
        expected, theirs = own
        compiled = compiled and getattr(self.config, "backend", None) != "eager"
        another = type(expected) is not self.habits.output_class
        if another or (call.cache is None) != (theirs is None):
            why = "its forward returns another class, or leaves another cache, than before"
            raise self.subject.refused(why, HINT)
        require_same(fields, expected, compiled=compiled)
        if call.cache is not None:
            mine, own_cache = (
                cache_state.take_apart(each, self.habits.counts) for each in (call.cache, theirs)  # type: ignore[arg-type]
            )
            if mine.form != own_cache.form:
                why = "compiled whole, it leaves a cache of another form"
                raise self.subject.refused(why, HINT)
            held = {"cache": mine.leaves}, {"cache": own_cache.leaves}
            require_same(*held, compiled=compiled)

    def entry(self, name: str) -> StitchedModule:
        """The first kind of call that was compiled; for ``decode`` of one token with a past."""
        if name == ENCODER and isinstance(self.encoder, WholeWay):
            return self.encoder.entry("input_ids")
        for kind, made in list(self.kinds.items()):
            if not isinstance(made, str) and (
                name == "input_ids" or (name == "decode" and kind.is_step)
            ):
                return made
        why = f": {self.encoder}" if name == ENCODER and self.encoder else ""
        why = f"there is no entry {name!r}{why}"
        raise UsageError(why, where="entry", hint="input_ids or decode, once it ran")

    def is_compiled(self, given: Mapping[str, object]) -> bool:
        """Whether calls like this one run what is compiled already."""
        return bool(self.kinds)

    def modules(self) -> dict[str, StitchedModule]:
        """What is compiled, by the calls that it serves."""
        found: dict[str, StitchedModule] = {}
        for each in self.ways():
            of = "" if each is self else f"{ENCODER}: "
            for kind, made in list(each.kinds.items()):
                if not isinstance(made, str):
                    name = f"{of}{kind.describe()}"
                    found[name if name not in found else f"{name} ({len(found)})"] = made
        return found

    def kept_modules(self) -> list[StitchedModule]:
        return [made for made in self.kinds.values() if not isinstance(made, str)]

    def found(self) -> object:
        kinds = [
            (kind, (), made) if isinstance(made, str) else (kind, made.model.held, None)
            for kind, made in self.kinds.items()
        ]
        encoder = self.encoder if isinstance(self.encoder, str) else None
        return self.habits, kinds, self.not_flat, encoder

    @classmethod
    def from_found(cls, found: Any, parts: Iterator[Artifact], subject: Subject) -> WholeWay:
        """The way that was saved; raises `ArtifactError` or `CaptureError`."""
        reading.refuse_model(subject.decoder)
        habits, kinds, not_flat, encoder = found
        way = cls(subject, habits)
        way.not_flat, way.encoder = not_flat, encoder
        for kind, held, why in kinds:
            if why is None:
                way.kinds[kind] = made = way._module_for(kind, held)
                way.adopt(made, next(parts))
            else:
                way.kinds[kind] = why
        return way


def held_names(cache: object) -> tuple[str, ...]:
    """The attributes that the layers of a cache have."""
    return tuple(sorted({name for layer in cache_state.layers_of(cache) for name in vars(layer)}))


def encoder_of(subject: Subject) -> Subject | None:
    """The encoder beside a decoder; None if transformers knows none."""
    found = subject.model.get_encoder()  # type: ignore[operator]
    return None if found in subject[:2] else subject._replace(decoder=found)


def _is_table(value: Mapping[object, object]) -> bool:
    return all(
        isinstance(key, str) and (each is None or isinstance(each, torch.Tensor))
        for key, each in value.items()
    )


def _form(value: torch.Tensor | Mapping[str, torch.Tensor | None]) -> Form:
    if isinstance(value, torch.Tensor):
        return value.dtype, value.ndim
    return tuple((key, None if each is None else _form(each)) for key, each in value.items())
