"""A small config from a family's default one.

It knows the roles that attribute names stand for, and no family by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from piecework.integrations.encoders.arguments import VOCABULARY

WIDTH = 32
HEADS = 4
LAYERS = 2
IMAGE = 32
PATCH = 8
NARROWEST = 16  # of the widths of several stages

_Rule = tuple[str, Callable[[Any], Any]]


def _to(value: int) -> Callable[[Any], Any]:
    """At most ``value``, for a number; the same for each number of a list."""

    def small(old: Any) -> Any:
        if type(old) is int:
            return min(old, value)
        return type(old)(small(each) for each in old)

    return small


def _scaled(old: Any) -> Any:
    """Widths of stages in their proportions, the narrowest one `NARROWEST`."""
    if type(old) is int:
        return min(old, WIDTH)
    least = min(old)
    return type(old)(max(8, 8 * round(NARROWEST * each / least / 8)) for each in old)


def _depth(layers: int) -> tuple[_Rule, ...]:
    return (
        (
            r"(num_)?(hidden_|encoder_|decoder_|en_|de_)?n?_?layers?|n_layers?|num_blocks"
            r"|num_(hidden|encoder|decoder|text|vision|self_attends|cross).*(layers|blocks|block)"
            r"|(encoder|decoder)_(depth|layers)|num_self_attends_per_block",
            _to(layers),
        ),
        (r"depths|layers_per_stage|layer_depths", _to(1)),
    )


_SIZES: tuple[_Rule, ...] = (
    (r"(\w+_)?vocab_size", _to(VOCABULARY)),
    (r"max_position_embeddings|n_positions|max_(source|target)_positions", lambda old: old),
    (r"image_size|img_size", _to(IMAGE)),
    (r"patch_size|tubelet_size", _to(PATCH)),
    (r"num_frames", _to(4)),
    (r"num_queries|num_latents", _to(8)),
)
_WIDTHS: tuple[_Rule, ...] = (
    (r"hidden_size|d_model|n_embd|dim|d_latents|text_embed_dim|vision_embed_dim", _to(WIDTH)),
    (r"(num_|n_)?(encoder_|decoder_|hidden_)?(num_)?(attention_)?heads?", _to(HEADS)),
    (r"num_key_value_heads|num_kv_heads", _to(HEADS)),
    (
        r"head_dim|d_kv|attention_head_size|rotary_dim|qk_(rope|nope)_head_dim|v_head_dim",
        _to(WIDTH // HEADS),
    ),
    (r"(q|kv)_lora_rank", _to(WIDTH // 2)),
    (r"n_routed_experts|num_(local_)?experts|moe_num_experts", _to(HEADS)),
    (r"num_experts_per_tok|num_selected_experts|moe_(top_?)?k|top_?k(_experts)?", _to(2)),
    (r"n_group|topk_group", _to(1)),
    (r"moe_intermediate_size", _to(WIDTH)),
    (
        r"intermediate_size|ffn_dim|(encoder|decoder)_ffn_dim|d_ff|hidden_dim|dim_feedforward",
        _to(2 * WIDTH),
    ),
    (r"embedding_size|projection_dim|embed_dim|conv_dim|d_embed", _scaled),
    (r"hidden_sizes|embed_dims|neck_hidden_sizes|widths|encoder_hidden_sizes", _scaled),
    (r"num_mel_bins|num_conv_pos_embeddings|num_conv_pos_embedding_groups", _to(16)),
)

#: The first whose model runs is taken; the last is for layers of several kinds that take turns.
LEVELS: tuple[tuple[_Rule, ...], ...] = (
    (*_depth(LAYERS), *_SIZES, *_WIDTHS),
    (*_depth(LAYERS), *_SIZES),
    _depth(LAYERS),
    (*_depth(3 * LAYERS), *_SIZES, *_WIDTHS),
)


def shrink(config: Any, level: int) -> None:
    """Make ``config``, and the configs in it, small in place.

    Args:
        level: index into `LEVELS`.
    """
    for name, value in list(vars(config).items()):
        if hasattr(value, "model_type") and hasattr(value, "to_dict"):
            shrink(value, level)
            continue
        if not _is_number(value):
            continue
        for pattern, smaller in LEVELS[level]:
            if re.fullmatch(pattern, name):
                setattr(config, name, smaller(value))
                break
        else:
            if name.endswith("_token_id") or name.endswith("_token_index"):
                setattr(config, name, _to(VOCABULARY - 1)(value))


def _is_number(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return bool(value) and all(type(each) is int for each in value)
    return type(value) is int
