"""One forward of a decoder that is served flat, from transformers' arguments to its output.

The tokens are computed by the ``run`` that it is given: eager while a model is tried, stitched
after.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_causal_mask, create_masks_for_generate

from piecework.errors import InputError
from piecework.integrations.transformers.flat.rope import ChangingRope
from piecework.integrations.transformers.own.refusals import (
    INERT,
    RECORDED,
    ConfigReader,
    Settings,
    refuse_call,
    tokens_of,
)
from piecework.integrations.transformers.request.state import (
    AttentionLayer,
    Masks,
    PositionRule,
    RequestState,
    registered_attention,
    request_context,
)
from piecework.integrations.transformers.request.static_decode import StaticDecode, StaticStep
from piecework.integrations.transformers.request.static_mask import StaticMasks
from piecework.integrations.transformers.request.step import CacheRows, DecodeStep, masks_by_type

Run = Callable[[str, torch.Tensor, torch.Tensor], torch.Tensor]

_TAKEN = (
    "input_ids",
    "inputs_embeds",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "use_cache",
)
# What continuous batching passes along, for its attention functions and for the sampling.
_PAGED = (
    "cache",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
    "read_index",
    "write_index",
    "block_table",
    "is_causal",
)
_SAMPLING = ("logits_indices", "logits_processor_args")
_KNOWN = frozenset((*_TAKEN, *INERT, *RECORDED))
_KNOWN_PAGED = _KNOWN.union(_PAGED, _SAMPLING)
# transformers' own, which make no mask where nothing is hidden from a token.
_CAUSAL = (create_causal_mask, create_masks_for_generate)


@dataclass(frozen=True, slots=True)
class Serving:
    """What is known of a decoder once it is admitted, and how a forward of it is served.

    Attributes:
        decoder: the module whose forward is replaced.
        dtype, device: of its embeddings when it was admitted.
        layers: its attention layers by name.
        ropes: its rotary embeddings that change with the length.
        position_rule: how it numbers tokens by default.
        create_masks: transformers' function that makes this model's masks.
        masks_see_positions: whether its masks separate packed sequences.
        output_class: what its forward returns.
        settings: what its config says.
        rows: where the rows of the caches lie that it has served.
        static: the memory of decode steps that are captured whole; None where none are.
        static_masks: makes the masks of static caches.
    """

    decoder: nn.Module
    dtype: torch.dtype
    device: torch.device
    layers: Mapping[str, AttentionLayer]
    ropes: tuple[ChangingRope, ...]
    position_rule: PositionRule
    create_masks: Callable[..., Masks]
    masks_see_positions: bool
    output_class: Callable[..., object]
    settings: ConfigReader
    rows: CacheRows = field(default_factory=CacheRows)
    static: StaticDecode | None = None
    static_masks: StaticMasks = field(default_factory=StaticMasks)

    def serve(self, given: Mapping[str, object], run: Run) -> object:
        """Run one forward.

        Args:
            given: the arguments of the decoder's forward, by name.
            run: the entry's name, flattened tokens and positions → hidden states [1, rows, hidden].

        Raises:
            InputError: the arguments ask for what a stitched decoder can't give.
        """
        settings = self.settings.now()
        known = _KNOWN if given.get("cache") is None else _KNOWN_PAGED
        strange = [name for name, v in given.items() if v is not None and name not in known]
        refuse_call(self.decoder, given, settings, strange)
        entry, tokens = tokens_of(self.decoder, given, self.dtype, self.device)
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
            request_context(
                request, in_full_graphs=None if self.static is None else step is not None
            ),
        ):
            for rope in self.ropes:
                rope.update(positions, self.dtype)
            hidden = run(entry, flat, positions)
            if step is not None:
                step.advance()
        if hidden.shape[1] != rows:
            hidden = hidden[:, :rows]
        output = self.output_class(
            last_hidden_state=hidden.view(request.batch, request.tokens, hidden.shape[-1]),
            past_key_values=request.cache,
        )
        return settings.returned(output, given)

    def _request(
        self, given: Mapping[str, object], tokens: torch.Tensor, settings: Settings
    ) -> RequestState:
        batch, length = tokens.shape[:2]
        cache, attention_mask = self._cache(given, settings), given.get("attention_mask")
        asked = position_ids = given.get("position_ids")
        if position_ids is None:
            past = 0 if cache is None else cache.get_seq_length()
            position_ids = self.position_rule.positions(
                attention_mask, past, batch, length, tokens.device
            )
        implementation = registered_attention(settings.implementation)
        paged = {name: given[name] for name in _PAGED if given.get(name) is not None}
        by_step = implementation is sdpa_attention_forward and length == 1 and not paged
        if by_step and settings.sees_all and self._nothing_masked(attention_mask, cache):
            masks = None
        else:
            # Before the forward: their sizes are those of the cache before these tokens enter it.
            packing = asked if self.masks_see_positions else None
            make = partial(
                *(make_masks, self.create_masks, self.decoder, tokens),
                *(attention_mask, cache, packing),
            )
            if by_step and settings.sees_all and self.create_masks in _CAUSAL:
                masks = self.static_masks.mask(cache, attention_mask, batch, settings, make)
            else:
                masks = make()
        step: DecodeStep | StaticStep | None = None
        if by_step and cache is not None:
            kinds = {layer.layer_type for layer in self.layers.values()}
            by_type = masks_by_type(masks, kinds)
            if by_type is not None:
                if self.static is not None:
                    step = self.static.take(cache, batch, by_type)
                if step is None:
                    step = DecodeStep(batch, cache, self.rows, by_type, self.dtype)
        return RequestState(
            layers=self.layers,
            batch=batch,
            tokens=length,
            implementation=implementation,
            masks=masks,
            cache=cache,
            position_ids=self._checked_positions(position_ids, batch, length),
            paged=paged,
            step=step,
        )

    def _nothing_masked(self, attention_mask: object, cache: Cache | None) -> bool:
        """Whether one token of each sequence sees all of a growing cache, without a mask."""
        if type(cache) is not DynamicCache or self.create_masks not in _CAUSAL:
            return False
        if attention_mask is None:
            return True
        if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2:
            return False
        # What lies behind the end of a mask is hidden.
        return attention_mask.shape[1] > cache.get_seq_length() and bool(attention_mask.all())

    def _cache(self, given: Mapping[str, object], settings: Settings) -> Cache | None:
        cache = given.get("past_key_values")
        if cache is not None and not isinstance(cache, Cache):
            raise InputError(
                f"past_key_values is a {type(cache).__name__}, not a transformers Cache",
                where="past_key_values",
                hint="pass a DynamicCache or a StaticCache",
            )
        use_cache = given.get("use_cache")
        if cache is None and (settings.use_cache if use_cache is None else use_cache):
            return DynamicCache(config=self.decoder.config)
        return cache

    @staticmethod
    def _checked_positions(given: object, batch: int, length: int) -> torch.Tensor:
        """Position ids of [batch, length]."""
        if isinstance(given, torch.Tensor) and given.shape in ((1, length), (batch, length)):
            whole = given.long()
            if not given.is_floating_point() or torch.equal(given, whole.to(given.dtype)):
                return whole if len(whole) == batch else whole.expand(batch, length)
        shown = tuple(given.shape) if isinstance(given, torch.Tensor) else type(given).__name__
        raise InputError(
            f"position_ids is {shown}; expected a tensor of integers, [{batch}, {length}]",
            where="position_ids",
            hint="unstitch(model) for positions between tokens",
        )


def make_masks(
    create: Callable[..., Masks],
    decoder: nn.Module,
    tokens: torch.Tensor,
    attention_mask: object,
    cache: Cache | None,
    position_ids: torch.Tensor | None = None,
) -> Masks:
    """The masks of all layers by transformers' ``create``, before the tokens enter ``cache``."""
    if isinstance(attention_mask, Mapping):
        return attention_mask
    dtype = decoder.get_input_embeddings().weight.dtype
    # As generate() does: only sizes, dtype and device of the embeddings are looked at.
    sizes_only = torch.empty((*tokens.shape[:2], 0), dtype=dtype, device=tokens.device)
    return create(
        config=decoder.config,
        inputs_embeds=sizes_only,
        attention_mask=attention_mask,
        past_key_values=cache,
        position_ids=position_ids,
    )
