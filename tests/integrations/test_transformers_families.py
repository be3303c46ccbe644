"""Thirteen transformers families: stitched from small configs, each must equal its own eager self token by token."""

from __future__ import annotations

import pytest
import torch
from small_llms import DEEPSEEK, GEMMA, WINDOW, Pair, build

from piecework.closeness import tolerance_of
from piecework.runtime.counters import counters

transformers = pytest.importorskip("transformers")

WINDOWED, FULL = "sliding_attention", "full_attention"
MIXTURE = {"num_local_experts": 4, "num_experts_per_tok": 2}
GEMMA2 = {key: GEMMA[key] for key in ("head_dim", "query_pre_attn_scalar", "sliding_window")}
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma2": {**GEMMA2, "attn_logit_softcapping": 2.0},
    "gemma3_text": {**GEMMA, "layer_types": [WINDOWED, WINDOWED, FULL]},
    "phi3": {},
    "gpt2": {"n_inner": 48},
    "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "mixtral": MIXTURE,
    "deepseek_v3": DEEPSEEK,
    "gpt_oss": {
        **MIXTURE,
        **{"head_dim": 8, "sliding_window": WINDOW, "layer_types": [WINDOWED, FULL, WINDOWED]},
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
}
# The implementation that transformers chooses for these by itself; the rest go through sdpa.
EAGER = {"gemma2", "gpt_oss"}


def family_of(name: str) -> torch.nn.Module:
    return build(name, seed=7, norms=0.5, **{"num_hidden_layers": 3, **FAMILIES[name]})


@pytest.mark.sample(3)
@pytest.mark.parametrize("family", FAMILIES)
def test_family_equals_eager(family: str) -> None:
    model = family_of(family)
    assert model.config._attn_implementation == ("eager" if family in EAGER else "sdpa")
    with counters.expect(num_graphs_seen=1):  # one graph serves prefill and decode
        pair = Pair(model)
        pair.generate(torch.randint(1, 97, (3, 11)), padded=4, max_new_tokens=8)
        for shape in ((1, 7), (3, 11), (1, 1)):
            pair.call(torch.randint(1, 97, shape), use_cache=False)


@pytest.mark.parametrize("way", ["flat", "whole"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, way: str) -> None:
    pair = Pair(family_of("gemma3_text").to(dtype), 4 * tolerance_of(dtype), way=way)
    caches = [transformers.DynamicCache(config=pair.eager.config) for _ in range(2)]
    for length in (7, 1, 1):
        got, _ = pair.call(torch.randint(1, 97, (2, length)), past_key_values=caches)
        assert got.logits.dtype is dtype
