"""Equal layers are compiled once by Inductor, whatever the depth of the model."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import piecework
from piecework.integrations.transformers import stitch, stitched_module


def llama(layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("layers", "backend", "compiles"),
    [
        (8, "eager", 0),
        pytest.param(8, "inductor", 3, marks=[pytest.mark.inductor, pytest.mark.nightly]),
        pytest.param(32, "inductor", 3, marks=[pytest.mark.inductor, pytest.mark.nightly]),
    ],
)
def test_a_llama_of_any_depth_has_three_pieces_to_compile(
    layers: int, backend: str, compiles: int
) -> None:
    model = llama(layers)
    tokens = torch.arange(1, 8)[None]
    expected = model(tokens).logits
    with piecework.counters.expect(num_inductor_compiles=compiles, num_graphs_seen=1):
        stitch(model, config={"backend": backend})
    report = stitched_module(model).report()
    assert (report.pieces, report.unique, report.splitting) == (layers + 1, 3, layers)
    assert f"{layers + 1} pieces, 3 unique" in str(report)
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-4)
