"""Families of transformers whose layers share a trace: the graph is that of a trace of every layer, and the tokens are the model's own."""

from __future__ import annotations

import pytest
import torch
from flat_trace import require_one_graph
from small_llms import DEEPSEEK, SHAPE, WINDOW

from piecework.integrations.transformers import stitch, unstitch
from piecework.integrations.transformers.flat.admission import admit, forget_layers
from piecework.integrations.transformers.flat.forward import (
    FlatIdsForward,
    TokenDimension,
    as_traced,
    example_inputs,
)
from piecework.integrations.transformers.stitcher import stitched_module
from piecework.runtime.config.compilation import CompilationConfig

transformers = pytest.importorskip("transformers")

SHARING = CompilationConfig(backend="eager", repeated_layers="found")
SIZES = {**SHAPE, "num_hidden_layers": 8}
MIXTURE = {"num_local_experts": 4, "num_experts_per_tok": 2}
TURNS = {"layer_types": ["sliding_attention", "full_attention"] * 4, "sliding_window": WINDOW}
MERGED = {
    "gemma3_text": {"head_dim": 8, "query_pre_attn_scalar": 8, **TURNS},
    "mixtral": MIXTURE,
}
NIGHTLY = {
    "llama": {},  # its tokens are compared below
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": WINDOW},
    "phi3": {},
    "gpt2": {"n_inner": 48},
    "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt_oss": {
        **MIXTURE,
        "head_dim": 8,
        **TURNS,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "deepseek_v3": DEEPSEEK,
}
FAMILIES = [*MERGED, *(pytest.param(name, marks=pytest.mark.nightly) for name in NIGHTLY)]


def build(family: str) -> torch.nn.Module:
    sizes = {**SIZES, **{**MERGED, **NIGHTLY}[family]}
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[family](**sizes)
    return transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_graph_is_the_flat_one(family: str) -> None:
    model = build(family)
    decoder = model.get_decoder()
    forward = decoder.forward
    serving = admit(model, decoder, forward)
    for rope in serving.ropes:
        rope.hold()
    try:
        with as_traced(decoder), torch.no_grad():
            given = tuple(example_inputs(decoder, "input_ids").values())
            flat = FlatIdsForward(decoder, forward)
            says = require_one_graph(flat, given, sizes=TokenDimension)
    finally:
        forget_layers(decoder)
    assert says.startswith("one trace served ")


def test_tokens_and_report() -> None:
    model = build("llama")
    ids = torch.arange(1, 13).reshape(2, 6)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        stitch(model, config=SHARING)
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected)
    assert "one trace served 7 of 8 repeated layers" in str(stitched_module(model).report())
    unstitch(model)
    assert not any("forward" in layer.__dict__ for layer in model.model.layers)
