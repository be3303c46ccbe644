"""Attention as a splitting op, whose body calls the model's own implementation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from piecework.errors import CaptureError
from piecework.integrations.transformers.request.state import (
    STATE_KEY,
    AttentionLayer,
    current_request,
)
from piecework.runtime.batch.forward_context import current_forward_context
from piecework.runtime.splitting_op import splitting_op

# By this name transformers finds our attention function, and no mask function: none are made.
IMPLEMENTATION = "piecework"
LAYER_NAME = "_piecework_layer_name"
SPLITTING_OP = "piecework::attention"

# What an attention function may be given besides the tensors. Literals stand in the emitted source.
_LITERALS = ("scaling", "softcap", "sliding_window", "is_causal")
_TENSORS = ("s_aux",)
# Passed along by decoder layers, of no meaning to the attention of one decoder-only forward.
_INERT = (
    *("position_ids", "use_cache"),
    *("output_attentions", "output_hidden_states", "output_router_logits"),
)


@splitting_op(
    SPLITTING_OP, mutates_args=("out",), rows="context", full_graphs="single_token_decode"
)
def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    s_aux: torch.Tensor | None = None,
    *,
    layer_name: str,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
) -> None:
    """Attend over the running request and write into ``out``."""
    request = current_request()
    layer = request.layers[layer_name]
    if request.step is not None and softcap is None and s_aux is None:
        request.step.attend(layer.layer_idx, layer.layer_type, query, key, value, out, scaling)
        return
    arguments = {
        "scaling": scaling,
        "softcap": softcap,
        "sliding_window": sliding_window,
        "is_causal": is_causal,
        "s_aux": s_aux,
    }
    batch, tokens = request.batch, request.tokens
    rows = batch * tokens
    query, key, value = (_by_row(tensor, batch, tokens) for tensor in (query, key, value))
    attended = request.attend(layer, query, key, value, arguments)
    out[:, :rows].view(batch, tokens, *out.shape[2:]).copy_(attended)
    if rows < out.shape[1]:
        out[:, rows:].zero_()  # padding of a captured batch: any finite value does


def _by_row(flat: torch.Tensor, batch: int, tokens: int) -> torch.Tensor:
    """[1, heads, rows, dim] seen as [batch, heads, tokens, dim], strided as eagerly."""
    if batch == 1 and flat.shape[2] == tokens:
        return flat
    heads, dim = flat.shape[1], flat.shape[3]
    return flat[0, :, : batch * tokens].view(heads, batch, tokens, dim).transpose(0, 1)


def attention_function(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """What the traced model calls for attention: one splitting op over the flattened batch."""
    out = query.new_empty((query.shape[0], query.shape[2], query.shape[1], value.shape[3]))
    if not torch.compiler.is_compiling() and _discovering() is not None:
        _discovering().see(module, attention_mask, kwargs)
        return out.zero_(), None
    passed = {
        name: kwargs[name] for name in (*_LITERALS, *_TENSORS) if kwargs.get(name) is not None
    }
    attention(query, key, value, out, layer_name=module._piecework_layer_name, **passed)
    return out, None


@dataclass(frozen=True, slots=True)
class Discovery:
    """The request of a dry run: notes which modules attend, and refuses what the op can't carry."""

    names: dict[torch.nn.Module, str]
    layer_types: Sequence[str] | None
    found: list[AttentionLayer]

    def see(
        self, module: torch.nn.Module, attention_mask: object, kwargs: dict[str, object]
    ) -> None:
        """Note one call; raises `CaptureError` for one that the splitting op can't carry."""
        known = (*_LITERALS, *_TENSORS, *_INERT)
        given = {
            **kwargs,
            "attention_mask": attention_mask,
            "dropout": kwargs.get("dropout") or None,
        }
        unknown = sorted(key for key, v in given.items() if key not in known and v is not None)
        index, why = getattr(module, "layer_idx", None), ""
        if any(layer.module is module for layer in self.found):
            why = "attention runs twice in this module in one forward, so its cache slot is not its own"
        elif unknown:
            why = (
                f"attention is called with {', '.join(unknown)}, which the splitting op can't carry"
            )
        elif not isinstance(index, int):
            why = "the attention module has no layer_idx, so its cache slot is unknown"
        name, types = self.names.get(module, type(module).__name__), self.layer_types or ()
        if why:
            raise CaptureError(why, where=name, hint="stitch(model) may serve it whole")
        of_type = types[index] if index < len(types) else None
        self.found.append(AttentionLayer(name, module, index, of_type, frozenset(kwargs)))


def _discovering() -> Discovery | None:
    context = current_forward_context()
    state = None if context is None else context.state.get(STATE_KEY)
    return state if isinstance(state, Discovery) else None


def register() -> None:
    """Let transformers know `attention_function` by `IMPLEMENTATION`."""
    ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, attention_function)


@contextmanager
def through_piecework(model: torch.nn.Module) -> Iterator[None]:
    """Let the modules of ``model`` find ``attention_function`` for the block."""
    register()
    before = [(config, config._attn_implementation) for config in _configs_of(model)]
    try:
        for config, _implementation in before:
            config._attn_implementation = IMPLEMENTATION
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation


def _configs_of(model: torch.nn.Module) -> list[PreTrainedConfig]:
    """The configs of the modules, outer ones first, which set their parts'."""
    found: dict[int, PreTrainedConfig] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig):
            for each in (config, *(getattr(config, name, None) for name in config.sub_configs)):
                if isinstance(each, PreTrainedConfig):
                    found.setdefault(id(each), each)
    return list(found.values())
