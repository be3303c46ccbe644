"""Thirteen transformers families: stitched from small configs, each must equal its own eager self token by token."""

from __future__ import annotations

import pytest
import torch
from small_llms import DEEPSEEK, GEMMA, SHAPE, WINDOW
from small_llms import build as built

from piecework.integrations.transformers import stitch
from piecework.runtime.config.compilation import CompilationConfig
from piecework.runtime.counters import counters

transformers = pytest.importorskip("transformers")

EAGER_PIECES = CompilationConfig(backend="eager")


MIXTURE = {"num_local_experts": 4, "num_experts_per_tok": 2}
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma2": {
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": WINDOW,
        "attn_logit_softcapping": 2.0,
    },
    "gemma3_text": {
        **GEMMA,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    "phi3": {},
    "gpt2": {"n_inner": 48},
    "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "mixtral": MIXTURE,
    "deepseek_v3": DEEPSEEK,
    "gpt_oss": {
        **MIXTURE,
        "head_dim": 8,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
}
# The implementation that transformers chooses for these by itself; the rest go through sdpa.
EAGER = {"gemma2", "gpt_oss"}


def build(family: str) -> torch.nn.Module:
    return built(family, seed=7, norms=0.5, **{"num_hidden_layers": 3, **FAMILIES[family]})


def tokens(batch: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * batch + length)
    return torch.randint(1, SHAPE["vocab_size"], (batch, length), generator=generator)


def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def generate(
    model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor, **kwargs: object
) -> tuple:
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=8,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **kwargs,
    )
    return out.sequences, torch.stack(out.logits)


def distance(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def left_padded() -> tuple[torch.Tensor, torch.Tensor]:
    """Three prompts of 9 tokens, the first two padded on the left."""
    ids, mask = tokens(3, 9), torch.ones(3, 9, dtype=torch.long)
    mask[0, :4] = 0
    mask[1, :1] = 0
    return ids, mask


@pytest.mark.sample(3)
@pytest.mark.parametrize("family", FAMILIES)
def test_family_equals_eager(family: str) -> None:
    model = build(family)
    assert model.config._attn_implementation == ("eager" if family in EAGER else "sdpa")
    prompts = [tokens(1, 7), tokens(2, 11), tokens(1, 1)]
    ids, mask = left_padded()
    expected = [logits(model, prompt) for prompt in prompts]
    expected_tokens, expected_logits = generate(model, ids, mask)

    with counters.expect(num_graphs_seen=1):  # one graph serves prefill and decode
        assert stitch(model, config=EAGER_PIECES) is model
        got = [logits(model, prompt) for prompt in prompts]
        got_tokens, got_logits = generate(model, ids, mask)

    for ours, theirs in zip(got, expected, strict=True):
        assert ours.shape == theirs.shape
        assert distance(ours, theirs) <= 1e-4
    assert torch.equal(got_tokens, expected_tokens)
    assert distance(got_logits, expected_logits) <= 1e-4
