"""The state of one request behind the splitting op; nothing of it is traced."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import Enum

import torch
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from piecework.errors import CaptureError, InputError, StaticGraphError
from piecework.integrations.transformers.request.step import Step
from piecework.runtime.batch.descriptor import PLAIN, BatchDescriptor
from piecework.runtime.batch.forward_context import (
    ForwardContext,
    ForwardScope,
    current_forward_context,
    get_forward_context,
    override_forward_context,
    set_forward_context,
)
from piecework.runtime.batch.mode import CUDAGraphMode

STATE_KEY = "piecework.integrations.transformers"
_DRY = f"{STATE_KEY}.request.state.dry_request"

Masks = torch.Tensor | Mapping[str, torch.Tensor | None] | None
AttentionFunction = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


class PositionRule(Enum):
    """How a model numbers its tokens when the caller gives no ``position_ids``."""

    AFTER_PAST = "one after the other, from the length of the cache on"
    COUNT_MASK = "by counting the attended tokens of the attention mask"

    def positions(
        self,
        attention_mask: object,
        past: int | torch.Tensor,
        batch: int,
        tokens: int,
        device: torch.device,
    ) -> torch.Tensor:
        """Position ids of shape [batch, tokens] (or [1, tokens] where all rows agree)."""
        if self is PositionRule.AFTER_PAST or attention_mask is None:
            if isinstance(past, int) and tokens == 1:
                return torch.full((batch, 1), past, device=device)
            if isinstance(past, int):
                return torch.arange(past, past + tokens, device=device).unsqueeze(0)
            if tokens == 1:
                return past.expand(batch, 1).clone()  # the cache counts on in its own tensor
            return (torch.arange(tokens, device=device) + past).unsqueeze(0)
        if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2:
            raise InputError(
                "this model numbers its tokens by a 2D attention mask, and the mask given is prepared already",
                where="position_ids",
                hint="pass position_ids",
            )
        counted = attention_mask.long().cumsum(dim=1) * attention_mask.long() - 1
        return counted[:, int(past) :]


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """One attention module of the decoder, and how its model calls the attention function."""

    name: str  # its path inside the decoder, the ``layer_name`` of the splitting op
    module: torch.nn.Module
    layer_idx: int  # its slot in the KV cache
    layer_type: str | None  # its key among several masks; None where one is for all
    passed: frozenset[str]  # the keyword arguments that its model passes

    def mask_of(self, masks: Masks) -> torch.Tensor | None:
        """The layer's own mask among those of the request."""
        if not isinstance(masks, Mapping):
            return masks
        if self.layer_type is None or self.layer_type not in masks:
            why = f"no mask for layer type {self.layer_type!r}; the request has {sorted(masks)}"
            hint = "pass a 2D attention_mask and let the model make its masks"
            raise InputError(why, where=self.name, hint=hint)
        return masks[self.layer_type]


@dataclass(frozen=True, slots=True)
class RequestState:
    """What the splitting op needs to know of one forward: ``tokens`` of each of ``batch`` rows."""

    layers: Mapping[str, AttentionLayer]
    batch: int
    tokens: int
    implementation: AttentionFunction | None  # None for the modeling file's eager one
    masks: Masks
    cache: Cache | None
    position_ids: torch.Tensor
    paged: Mapping[str, object]
    step: Step | None = None  # the forward as a decode step, if it is one

    def attend(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        arguments: Mapping[str, object],
    ) -> torch.Tensor:
        """Attention of [batch, heads, tokens, dim], as [batch, tokens, heads, dim]."""
        if self.cache is not None:
            key, value = self.cache.update(key, value, layer.layer_idx)
        function = self.implementation or _eager_attention_of(layer.module)
        call = {name: value for name, value in arguments.items() if name in layer.passed}
        if "position_ids" in layer.passed:
            call["position_ids"] = self.position_ids
        if "dropout" in layer.passed:
            call["dropout"] = 0.0
        call.update(self.paged)  # a dict for this layer alone: a paged cache writes into it
        return function(layer.module, query, key, value, layer.mask_of(self.masks), **call)[0]


def request_context(state: object, *, in_full_graphs: bool | None = None) -> ForwardScope:
    """Make ``state`` the request of a block; ``in_full_graphs`` is None without such graphs."""
    outer = current_forward_context() or ForwardContext()
    if in_full_graphs is False and outer.cudagraph_runtime_mode is CUDAGraphMode.FULL:
        raise InputError(
            "the forward context asks for a full graph, and this request's cache does not lie in its memory",
            where="forward context",
            hint="leave the mode to the stitched model",
        )
    batch = outer.batch
    if in_full_graphs is not None:
        batch = replace(batch or PLAIN, uniform_decode=in_full_graphs)
    state = {**outer.state, STATE_KEY: state}
    return override_forward_context(replace(outer, state=state, batch=batch))


def current_request() -> RequestState:
    """The request of the running forward; raises `InputError` outside of one."""
    state = get_forward_context().state.get(STATE_KEY)
    if not isinstance(state, RequestState):
        why = "piecework::attention ran outside the forward of a stitched model"
        hint = f"call the model that stitch() returned; capture and measure take context_for={_DRY}"
        raise InputError(why, where="piecework::attention", hint=hint)
    return state


def registered_attention(implementation: str) -> AttentionFunction | None:
    """The function registered by a name; None for "eager"; `CaptureError` for an unknown one."""
    if implementation == "eager":
        return None
    try:
        return ALL_ATTENTION_FUNCTIONS[implementation]
    except KeyError:
        why = f"attention implementation {implementation!r} is not registered in transformers"
        hint = "use 'sdpa' or 'eager'"
        raise CaptureError(why, where="config._attn_implementation", hint=hint) from None


def _eager_attention_of(module: torch.nn.Module) -> AttentionFunction:
    """The ``eager_attention_forward`` of a module's modeling file."""
    for cls in type(module).__mro__:
        found = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if found is not None:
            return found
    raise CaptureError(
        f"{type(module).__module__} has no eager_attention_forward, so its eager attention can't be called",
        where=type(module).__name__,
        hint="load the model with attn_implementation='sdpa'",
    )


@contextmanager
def dry_request(
    mode: CUDAGraphMode, descriptor: BatchDescriptor
) -> Iterator[ForwardContext | None]:
    """The context of a run on dummy tokens; the ``context_for`` of a capture."""
    if mode is CUDAGraphMode.FULL:
        raise StaticGraphError(
            "a full graph would freeze the attention of a dummy request",
            where=descriptor.describe(),
            hint="capture in mode PIECEWISE, or decode steps of static caches by "
            "stitch(model, capture=..., max_cache_len=...)",
        )
    state = RequestState(
        layers=_EveryLayer(),
        batch=1,
        tokens=descriptor.num_tokens,
        implementation=_no_attention,
        masks=None,
        cache=None,
        position_ids=torch.zeros(1, descriptor.num_tokens, dtype=torch.long),
        paged={},
    )
    scope = set_forward_context(cudagraph_runtime_mode=mode, batch_descriptor=descriptor)
    with scope as context, request_context(state):
        yield context


class _EveryLayer(dict[str, AttentionLayer]):
    """Any layer's name, with nothing behind it."""

    def __missing__(self, name: str) -> AttentionLayer:
        return AttentionLayer(name, torch.nn.Identity(), 0, None, frozenset())


def _no_attention(
    module: object, query: torch.Tensor, key: object, value: torch.Tensor, *_: object, **__: object
) -> tuple[torch.Tensor, None]:
    """Zeros of the result's shape: [batch, tokens, heads, value dim]."""
    batch, heads, tokens, _dim = query.shape
    return query.new_zeros(batch, tokens, heads, value.shape[3]), None
