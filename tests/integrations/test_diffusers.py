"""Diffusion transformers from a config: other rows, resolutions, texts and masks are answered as eager does, and what is missing is said."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from piecework.errors import UsageError
from piecework.integrations import protocol
from piecework.integrations.loading import load_model
from piecework.integrations.protocol import LoadedModel, compare
from piecework.runtime.config.compilation import CompilationConfig

LATENTS = {
    **{"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 5},
    **{"in_channels": 4, "out_channels": 4, "sample_size": 8},
}
CLASSES: dict[str, dict[str, object]] = {
    "DiTTransformer2DModel": {**LATENTS, "num_embeds_ada_norm": 10},
    "PixArtTransformer2DModel": {**LATENTS, "cross_attention_dim": 32, "caption_channels": 24},
    "SD3Transformer2DModel": {**LATENTS, "joint_attention_dim": 24, "caption_projection_dim": 32, "pooled_projection_dim": 16, "pos_embed_max_size": 16},
    "FluxTransformer2DModel": {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1, "num_single_layers": 5, "in_channels": 8, "joint_attention_dim": 24, "pooled_projection_dim": 16, "axes_dims_rope": [4, 6, 6], "guidance_embeds": True},
    "SanaTransformer2DModel": {**LATENTS, "num_cross_attention_heads": 2, "cross_attention_head_dim": 16, "cross_attention_dim": 32, "caption_channels": 24},
    "AuraFlowTransformer2DModel": {"sample_size": 8, "in_channels": 4, "out_channels": 4, "num_mmdit_layers": 1, "num_single_dit_layers": 5, "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 24, "caption_projection_dim": 32, "pos_embed_max_size": 64},
}  # fmt: skip


def loaded(folder: Path, name: str, fields: Mapping[str, object]) -> LoadedModel:
    path = folder / "config.json"
    path.write_text(json.dumps({"_class_name": name, **fields}))
    return load_model(str(path))


@pytest.mark.sample(len(CLASSES))
@pytest.mark.parametrize("name", CLASSES)
def test_a_class(name: str, tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    model = loaded(tmp_path, name, CLASSES[name])
    shapes = {each[1]["hidden_states"].shape[1:] for each in model.more_calls}  # type: ignore[attr-defined]
    assert len(model.more_calls) == 4 and len(shapes) == 2
    eager = model.run(0)
    assert all(bool(each.abs().max() > 0) for each in eager.values)
    stitched = model.stitch(CompilationConfig(backend="eager"))
    result = compare(eager, model.run(0, stitched))
    assert result.agree, result.text(eager)
    assert len(stitched.traces) <= 3


def test_a_config_of_no_model(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    with pytest.raises(UsageError, match="has no model 'FluxPipelineOfMine'"):
        loaded(tmp_path, "FluxPipelineOfMine", {})
    with pytest.raises(UsageError, match="no model can be made"):
        loaded(tmp_path, "DiTTransformer2DModel", {**LATENTS, "norm_type": "none"})


def test_diffusers_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="needs diffusers") as raised:
        loaded(tmp_path, "DiTTransformer2DModel", LATENTS)
    assert "pip install 'piecework[diffusers]'" in str(raised.value)
