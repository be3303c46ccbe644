"""Small causal LMs of transformers' families. In: a family and what differs from `SHAPE`. Out: a model with seeded weights, large enough that a wrong mask or position shows."""

from __future__ import annotations

import torch

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
WINDOW = 4  # shorter than most prompts
# Of gemma3_text: a windowed layer and a full one, so that there are two masks and two kinds of cache slots.
GEMMA = {
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"],
}
# Of deepseek_v3: keys and values of different widths, and experts that are chosen, behind one dense layer.
DEEPSEEK = {
    "num_key_value_heads": 4,
    "num_experts_per_tok": 2,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
}


def build(
    family: str = "llama",
    *,
    seed: int = 3,
    scale: float = 0.3,
    norms: float = 0.0,
    **fields: object,
) -> torch.nn.Module:
    """A model of ``family``; ``norms`` is added to weights of one dimension."""
    import transformers

    config = transformers.CONFIG_MAPPING[family](**{**SHAPE, **fields})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
            if weight.ndim == 1:
                weight.add_(norms)
    return model


def scatter(model: torch.nn.Module) -> torch.nn.Module:
    """``model`` with normal weights of 0.3, drawn from torch's own generator, where they have two dimensions or more."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.copy_(torch.randn(weight.shape) * 0.3)
    return model
