"""The flat way: a decoder's forwards by a stitched function of one row of tokens."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_causal_mask, create_masks_for_generate

from piecework.errors import ArtifactError, InputError, UsageError
from piecework.integrations.transformers import flat_forward
from piecework.integrations.transformers import settings as reading
from piecework.integrations.transformers.request import state as states
from piecework.integrations.transformers.request import step as steps
from piecework.integrations.transformers.request.attention import LAYER_NAME, attention, register
from piecework.integrations.transformers.request.static_decode import (
    StaticDecode,
    StaticStep,
    static_decode,
)
from piecework.integrations.transformers.way import AGAIN, Subject, Way
from piecework.runtime.artifact.model import Artifact
from piecework.runtime.compile import compile_with_mode
from piecework.runtime.stitched import StitchedModule

FLAT_HINT = "stitch(model) may serve it whole"
_TAKEN = (
    *("input_ids", "inputs_embeds", "attention_mask", "position_ids"),
    *("past_key_values", "use_cache"),
)
# What continuous batching passes along, for its attention functions and for the sampling.
_PAGED = (
    *("cache", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
    *("read_index", "write_index", "block_table", "is_causal"),
)
_SAMPLING = ("logits_indices", "logits_processor_args")
_KNOWN = frozenset((*_TAKEN, *reading.INERT, *reading.RECORDED))
_KNOWN_PAGED = _KNOWN.union(_PAGED, _SAMPLING)
# transformers' own, which make no mask where nothing is hidden from a token.
_CAUSAL = (create_causal_mask, create_masks_for_generate)

Run = Callable[[str, torch.Tensor, torch.Tensor], torch.Tensor]


class Habits(NamedTuple):
    """What running a decoder showed."""

    rule: states.PositionRule
    masks: str  # which of `mask_makers` makes its masks
    masks_see_positions: bool
    output_class: Callable[..., object]


class FlatWay(Way):
    """A decoder served flattened, its attention ``layers`` carrying their names."""

    name = "flat"

    def __init__(
        self, subject: Subject, layers: Sequence[states.AttentionLayer], habits: Habits
    ) -> None:
        super().__init__(subject)
        self.layers = {layer.name: layer for layer in layers}
        self.static: StaticDecode | None = None
        self._habits = habits
        self._create_masks = mask_makers(self.model)[habits.masks]
        self._layer_types = {layer.layer_type for layer in layers}
        self._ropes = flat_forward.changing_ropes(self.decoder)
        self._rows, self._static_masks = steps.CacheRows(), steps.StaticMasks()
        self._entries: dict[str, StitchedModule] = {}

    def serve(self, given: Mapping[str, object], run: Run | None = None) -> object:
        """Run a forward by ``run``, or what is stitched; raises `InputError`."""
        settings = self.settings.now()
        known = _KNOWN if given.get("cache") is None else _KNOWN_PAGED
        strange = [name for name, v in given.items() if v is not None and name not in known]
        reading.refuse_call(self.decoder, given, settings, strange)
        entry, tokens = reading.tokens_of(self.decoder, given, self.dtype, self.device)
        if entry == "input_ids":
            tokens = tokens.long()
        request = self._request(given, tokens, settings)
        rows = request.batch * request.tokens
        # Contiguous, as they were traced.
        flat = tokens.reshape(1, rows, *tokens.shape[2:]).contiguous()
        positions = request.position_ids.reshape(1, rows).contiguous()
        step = request.step if isinstance(request.step, StaticStep) else None
        with (
            torch.no_grad() if torch.is_grad_enabled() else nullcontext(),
            states.request_context(
                request, in_full_graphs=None if self.static is None else step is not None
            ),
        ):
            for rope in self._ropes:
                rope.update(positions, self.dtype)
            hidden = (run or self._run)(entry, flat, positions)
            if step is not None:
                step.advance()
        if hidden.shape[1] != rows:
            hidden = hidden[:, :rows]
        output = self._habits.output_class(
            last_hidden_state=hidden.view(request.batch, request.tokens, hidden.shape[-1]),
            past_key_values=request.cache,
        )
        return settings.returned(output, given)

    def _run(self, entry: str, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        compiled = self._entries.get(entry)
        if compiled is None:
            compiled = self.entry(entry)
        return compiled(tokens, positions)

    def _request(
        self, given: Mapping[str, object], tokens: torch.Tensor, settings: reading.Settings
    ) -> states.RequestState:
        batch, length = tokens.shape[:2]
        cache, attention_mask = self._cache(given, settings), given.get("attention_mask")
        asked = position_ids = given.get("position_ids")
        if position_ids is None:
            past = 0 if cache is None else cache.get_seq_length()
            position_ids = self._habits.rule.positions(
                attention_mask, past, batch, length, tokens.device
            )
        implementation = states.registered_attention(settings.implementation)
        paged = {name: given[name] for name in _PAGED if given.get(name) is not None}
        by_step = implementation is sdpa_attention_forward and length == 1 and not paged
        causal = by_step and settings.sees_all and self._create_masks in _CAUSAL
        if causal and _nothing_masked(attention_mask, cache):
            masks = None
        else:
            # Before the forward: their sizes are those of the cache before these tokens enter it.
            packing = asked if self._habits.masks_see_positions else None
            make = partial(self._make_masks, tokens, attention_mask, cache, packing)
            if causal:
                masks = self._static_masks.mask(cache, attention_mask, batch, settings, make)
            else:
                masks = make()
        step: steps.DecodeStep | StaticStep | None = None
        by_type = (
            steps.masks_by_type(masks, self._layer_types) if by_step and cache is not None else None
        )
        if by_type is not None:
            if self.static is not None:
                step = self.static.take(cache, batch, by_type)
            if step is None:
                step = steps.DecodeStep(batch, cache, self._rows, by_type, self.dtype)
        return states.RequestState(
            layers=self.layers,
            batch=batch,
            tokens=length,
            implementation=implementation,
            masks=masks,
            cache=cache,
            position_ids=_checked_positions(position_ids, batch, length),
            paged=paged,
            step=step,
        )

    def _make_masks(
        self, tokens: torch.Tensor, attention_mask: object, cache: Cache | None, packing: object
    ) -> states.Masks:
        """The masks of all layers by transformers' own, before the tokens enter ``cache``."""
        if isinstance(attention_mask, Mapping):
            return attention_mask
        # As generate() does: only sizes, dtype and device of the embeddings are looked at.
        sizes_only = torch.empty((*tokens.shape[:2], 0), dtype=self.dtype, device=tokens.device)
        return self._create_masks(
            config=self.decoder.config,
            inputs_embeds=sizes_only,
            attention_mask=attention_mask,
            past_key_values=cache,
            position_ids=packing,
        )

    def _cache(self, given: Mapping[str, object], settings: reading.Settings) -> Cache | None:
        cache = given.get("past_key_values")
        if cache is not None and not isinstance(cache, Cache):
            why = f"past_key_values is a {type(cache).__name__}, not a transformers Cache"
            hint = "pass a DynamicCache or a StaticCache"
            raise InputError(why, where="past_key_values", hint=hint)
        use_cache = given.get("use_cache")
        if cache is None and (settings.use_cache if use_cache is None else use_cache):
            return DynamicCache(config=self.decoder.config)
        return cache

    def is_compiled(self, given: Mapping[str, object]) -> bool:
        """Whether calls like this one run what is compiled already."""
        made = self._entries.get(
            "input_ids" if given.get("inputs_embeds") is None else "inputs_embeds"
        )
        return made is not None and bool(made.traces)

    def entry(self, name: str) -> StitchedModule:
        """The stitched function for tokens that come as ``name``, compiled when first asked for."""
        if name not in flat_forward.ENTRIES:
            raise UsageError(
                f"there is no entry {name!r}", where="entry", hint=" or ".join(flat_forward.ENTRIES)
            )
        with self.compiling:
            if name not in self._entries:
                made = self._flattened(name)
                with torch.no_grad():
                    made.prepare(*flat_forward.example_inputs(self.decoder, name))
                self._entries[name] = made
            return self._entries[name]

    def _flattened(self, entry: str) -> StitchedModule:
        """The decoder's flattened forward, to be stitched, or taken from an artifact."""
        for rope in self._ropes:
            rope.hold()
        ops = None if self.config is None else self.config.splitting_ops
        # The class's name labels the model in the emitted banner and in the report.
        named = type(type(self.decoder).__name__, (flat_forward.ENTRIES[entry],), {})
        return compile_with_mode(
            named(self.decoder, self.forward),
            splitting_ops=None if ops is None else [*ops, attention],  # None: every registered one
            config=self.config,
            sizes=flat_forward.TokenDimension(),
            around=partial(flat_forward.as_traced, self.decoder),
            kept=self.kept,
            deferred=True,
        )

    def modules(self) -> dict[str, StitchedModule]:
        return dict(self._entries)

    def static_decode(self, largest: int, length: int) -> StaticDecode:
        """Have decode steps of static caches served from memory that full graphs can hold."""
        self.static = static_decode(
            self.entry("input_ids"),
            self.layers,
            self.decoder.config,
            largest=largest,
            length=length,
        )
        return self.static

    def kept_modules(self) -> list[StitchedModule]:
        """What serves token ids; embeddings are compiled anew."""
        return [self.entry("input_ids")]

    def found(self) -> object:
        layers = [
            (each.name, each.layer_idx, each.layer_type, each.passed)
            for each in self.layers.values()
        ]
        return layers, self._habits

    @classmethod
    def from_found(cls, found: Any, parts: Iterator[Artifact], subject: Subject) -> FlatWay:
        """The way that was saved, or `ArtifactError`, `CaptureError` and the decoder as it was."""
        refuse_at_sight(subject)
        decoder, (named, habits) = subject.decoder, found
        layers = [
            states.AttentionLayer(each[0], _layer_module(decoder, *each[:2]), *each[1:])
            for each in named
        ]
        way = cls(subject, layers, habits)
        name_layers(layers)
        try:
            made = way._flattened("input_ids")
            way.adopt(made, next(parts))
        except BaseException:
            forget_layers(decoder)
            raise
        way._entries["input_ids"] = made
        return way


def mask_makers(model: nn.Module) -> dict[str, Callable[..., states.Masks]]:
    """The functions that may make a model's masks, in the order in which they are tried."""
    own = getattr(model, "create_masks_for_generate", create_masks_for_generate)
    return {"for generate": own, "causal": create_causal_mask}


def refuse_at_sight(subject: Subject) -> None:
    """Raise `CaptureError` where a model need not be run to see that it can't be served flat."""
    reading.refuse_model(subject.decoder)
    if reading.is_encoder_decoder(subject.decoder):
        why = "it attends to an encoder's states, which are no tokens of its own row"
        raise subject.refused(why, FLAT_HINT)
    accepted = inspect.signature(subject.decoder.forward).parameters
    for name in ("input_ids", "position_ids", "past_key_values"):
        if name not in accepted:
            why = f"its forward takes no {name}, so a batch can't be flattened into one row"
            raise subject.refused(why, FLAT_HINT)


def name_layers(layers: Sequence[states.AttentionLayer]) -> None:
    """Let attention modules carry their names, by which the traced op knows them."""
    register()
    for layer in layers:
        setattr(layer.module, LAYER_NAME, layer.name)


def forget_layers(decoder: nn.Module) -> None:
    """Take the layer names off the modules of ``decoder``."""
    for module in decoder.modules():
        module.__dict__.pop(LAYER_NAME, None)


def _layer_module(decoder: nn.Module, name: str, index: int) -> nn.Module:
    try:
        module = decoder.get_submodule(name)
    except AttributeError as error:
        raise ArtifactError(f"the model has no {name}", hint=AGAIN) from error
    now = getattr(module, "layer_idx", None)
    if now != index:
        raise ArtifactError(
            f"{name} is layer {now}; when the model was saved it was {index}", hint=AGAIN
        )
    return module


def _nothing_masked(attention_mask: object, cache: Cache | None) -> bool:
    """Whether one token of each sequence sees all of a growing cache, without a mask."""
    if type(cache) is not DynamicCache:
        return False
    if attention_mask is None:
        return True
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2:
        return False
    # What lies behind the end of a mask is hidden.
    return attention_mask.shape[1] > cache.get_seq_length() and bool(attention_mask.all())


def _checked_positions(given: object, batch: int, length: int) -> torch.Tensor:
    """Position ids of [batch, length]."""
    if isinstance(given, torch.Tensor) and given.shape in ((1, length), (batch, length)):
        whole = given.long()
        if not given.is_floating_point() or torch.equal(given, whole.to(given.dtype)):
            return whole if len(whole) == batch else whole.expand(batch, length)
    shown = tuple(given.shape) if isinstance(given, torch.Tensor) else type(given).__name__
    why = f"position_ids is {shown}; expected a tensor of integers, [{batch}, {length}]"
    raise InputError(why, where="position_ids", hint="unstitch(model) for positions between tokens")
