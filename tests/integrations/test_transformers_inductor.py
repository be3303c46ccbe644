"""A stitched model with pieces compiled by Inductor: its numbers stay the model's own."""

from __future__ import annotations

import pytest
import torch
from small_llms import build

from piecework.integrations.transformers import stitch

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.inductor


def check_against_eager(model: torch.nn.Module) -> None:
    """Stitch ``model``; padded generation and two prefills must be what they were before."""
    generator = torch.Generator().manual_seed(12)
    prompts = [torch.randint(1, 97, shape, generator=generator) for shape in ((1, 7), (3, 9))]
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[0, :4] = 0
    how = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    with torch.no_grad():
        expected = [model(ids).logits for ids in prompts]
    tokens = model.generate(prompts[1], **how)
    stitch(model)
    with torch.no_grad():
        for ids, theirs in zip(prompts, expected, strict=True):
            assert float((model(ids).logits - theirs).norm() / theirs.norm()) <= 1e-4
    assert torch.equal(model.generate(prompts[1], **how), tokens)


@pytest.mark.nightly
def test_experts_and_sinks_compile() -> None:
    """gpt_oss has the most that a piece may hold: routed experts, sinks as an argument of attention, two windows."""
    model = build(
        "gpt_oss",
        seed=11,
        scale=0.2,
        num_hidden_layers=3,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=4,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    check_against_eager(model)
