"""Small causal LMs and pairs of transformers' families with seeded weights, large enough that a wrong mask or position shows."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from models import EAGER
from torch import nn

SHAPE = {
    **{"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
    **{"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0},
}
WINDOW = 4  # shorter than most prompts
# Of gemma3_text: a windowed layer and a full one, so that there are two masks and two kinds of cache slots.
GEMMA = {
    **{"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": WINDOW},
    "layer_types": ["sliding_attention", "full_attention"],
}
# Of deepseek_v3: keys and values of different widths, and experts that are chosen, behind one dense layer.
DEEPSEEK = {
    **{"num_key_value_heads": 4, "num_experts_per_tok": 2, "n_routed_experts": 8, "n_group": 2},
    **{"n_shared_experts": 1, "topk_group": 1, "moe_intermediate_size": 16, "q_lora_rank": 16},
    **{"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16},
    "first_k_dense_replace": 1,
}
# Of t5 and bart, which name their sizes otherwise.
PAIRS = {
    "t5": {"d_kv": 8, "d_ff": 48, "num_decoder_layers": 2, "decoder_start_token_id": 1},
    "bart": {
        **{"encoder_layers": 1, "decoder_layers": 1, "decoder_start_token_id": 1},
        **{f"{part}_attention_heads": 4 for part in ("encoder", "decoder")},
        **{f"{part}_ffn_dim": 48 for part in ("encoder", "decoder")},
        "forced_eos_token_id": None,
    },
}


# Ways to generate, which every kind of model is asked for.
GENERATIONS = {
    **{"sampled": {"do_sample": True, "top_k": 20}, "beams": {"num_beams": 3}},
    **{"several for each": {"num_return_sequences": 2, "do_sample": True}},
    "no cache": {"use_cache": False},
}


def build(
    family: str = "llama",
    *,
    seed: int = 3,
    scale: float = 0.3,
    norms: float = 0.0,
    **fields: object,
) -> Any:
    """A model of ``family``; ``norms`` is added to weights of one dimension."""
    import transformers

    config = transformers.CONFIG_MAPPING[family](**{**SHAPE, **PAIRS.get(family, {}), **fields})
    kind = (
        transformers.AutoModelForSeq2SeqLM if family in PAIRS else transformers.AutoModelForCausalLM
    )
    model = kind.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
            if weight.ndim == 1:
                weight.add_(norms)
    return model


def prompts(batch: int, length: int = 6) -> torch.Tensor:
    return torch.randint(1, 97, (batch, length), generator=torch.Generator().manual_seed(batch))


def generated(model: Any, batch: int, **how: object) -> torch.Tensor:
    """What ``model`` makes of a batch of `prompts`, and the prompts."""
    ids = prompts(batch)
    how = {"max_new_tokens": 8, "do_sample": False, **how}
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **how)


class Around(nn.Module):
    """Has ``states`` say what another module is given."""

    def __init__(self, inner: nn.Module, states: Callable[[Any, torch.Tensor], object]) -> None:
        super().__init__()
        self.inner, self.states = inner, states

    def forward(self, states: torch.Tensor, *more: object) -> torch.Tensor:
        return self.inner(self.states(self, states), *more)


class Pair:
    """One model twice: as it is, and stitched."""

    def __init__(self, model: Any, tolerance: float = 1e-4, **how: object) -> None:
        from piecework.integrations.transformers import stitch

        self.eager, self.tolerance = model, tolerance
        self.stitched = stitch(copy.deepcopy(model), config=EAGER, **how)

    def call(self, ids: torch.Tensor | None = None, **given: Any) -> tuple[Any, Any]:
        """One forward of each, with ``past_key_values`` of its own; logits and caches must be equal."""
        mine, theirs = given, dict(given)
        if "past_key_values" in given:
            mine["past_key_values"], theirs["past_key_values"] = given["past_key_values"]
        with torch.no_grad():
            want, got = self.eager(ids, **theirs), self.stitched(ids, **mine)
        self.close(got.logits, want.logits)
        self.same_cache(got.past_key_values, want.past_key_values)
        return got, want

    def generate(self, ids: torch.Tensor, padded: int = 0, **how: Any) -> Any:
        """Generate with both: tokens, scores and caches must be equal; of one row ``padded`` are hidden."""
        mask = torch.ones_like(ids)
        mask[-1, :padded] = 0
        how = {"max_new_tokens": 6, "do_sample": False, "attention_mask": mask, **how}
        how |= {"return_dict_in_generate": True, "output_scores": True}
        found = []
        for model in (self.stitched, self.eager):
            torch.manual_seed(1)
            found.append(model.generate(ids, **how))
        got, want = found
        assert torch.equal(got.sequences, want.sequences)
        for mine, their in zip(got.scores, want.scores, strict=True):
            self.close(mine, their)
        self.same_cache(got.past_key_values, want.past_key_values)
        return got

    def close(self, mine: Any, their: Any) -> None:
        torch.testing.assert_close(mine, their, rtol=self.tolerance, atol=self.tolerance)

    def same_cache(self, mine: Any, their: Any) -> None:
        """Two caches, layers or what these hold, of one class and equal."""
        assert type(mine) is type(their)
        if isinstance(their, torch.Tensor):
            self.close(mine, their)
        elif isinstance(their, (list, dict)):
            assert len(mine) == len(their)
            for key in their if isinstance(their, dict) else range(len(their)):
                self.same_cache(mine[key], their[key])
        elif hasattr(their, "__dict__") and not isinstance(their, type):
            self.same_cache(vars(mine), vars(their))
        else:
            assert mine == their
