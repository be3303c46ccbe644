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


@pytest.mark.sample(3)
@pytest.mark.parametrize("family", FAMILIES)
def test_family_equals_eager(family: str) -> None:
    model = built(family, seed=7, norms=0.5, **{"num_hidden_layers": 3, **FAMILIES[family]})
    assert model.config._attn_implementation == ("eager" if family in EAGER else "sdpa")
    prompts = [torch.randint(1, SHAPE["vocab_size"], shape) for shape in ((1, 7), (3, 11), (1, 1))]
    mask = torch.ones(3, 11, dtype=torch.long)
    mask[0, :4] = mask[1, :1] = 0  # on the left

    def results() -> list[torch.Tensor]:
        with torch.no_grad():
            logits = [model(ids, use_cache=False).logits for ids in prompts]
        how = {"max_new_tokens": 8, "do_sample": False, "output_logits": True}
        how |= {"attention_mask": mask, "return_dict_in_generate": True}
        out = model.generate(prompts[1], **how)
        return [out.sequences, torch.stack(out.logits), *logits]

    tokens, *expected = results()
    with counters.expect(num_graphs_seen=1):  # one graph serves prefill and decode
        assert stitch(model, config=EAGER_PIECES) is model
        got_tokens, *got = results()
    assert torch.equal(got_tokens, tokens)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.shape == theirs.shape
        assert float((ours - theirs).norm() / theirs.norm()) <= 1e-4
