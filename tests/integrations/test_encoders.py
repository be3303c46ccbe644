"""Models called once, by a config: encoders, vision and audio of transformers, and diffusion transformers; other rows, lengths, resolutions and masks are answered as eager does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from models import EAGER

import piecework
from piecework.errors import UsageError
from piecework.integrations import protocol
from piecework.integrations.encoders.arguments import SIZES
from piecework.integrations.loading import load_model
from piecework.integrations.protocol import LoadedModel, compare
from piecework.runtime.stitched import StitchedModule

transformers = pytest.importorskip("transformers")

LAYERS = 5  # one more than what is cut into blocks needs: the first often differs
TEXT = {
    **{"hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 2},
    **{"intermediate_size": 64, "vocab_size": 99},
}
VISION = {**TEXT, "image_size": 16, "patch_size": 8}
PAIR = {
    **{"d_model": 32, "encoder_layers": LAYERS, "decoder_layers": 1, "vocab_size": 99},
    **{f"{part}_attention_heads": 2 for part in ("encoder", "decoder")},
    **{f"{part}_ffn_dim": 64 for part in ("encoder", "decoder")},
    **{"max_position_embeddings": 64, "pad_token_id": 1},
}
WHISPER = {**PAIR, "max_source_positions": 20, "max_target_positions": 20, "num_mel_bins": 8}
FAMILIES: dict[str, dict[str, object]] = {
    "bert": TEXT,
    "roberta": TEXT,
    "electra": {**TEXT, "embedding_size": 16},
    "albert": {**TEXT, "embedding_size": 16},
    "distilbert": {"dim": 32, "n_layers": LAYERS, "n_heads": 2, "hidden_dim": 64, "vocab_size": 99},
    "deberta": {**TEXT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "deberta-v2": {**TEXT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "mpnet": TEXT,
    "xlm-roberta": TEXT,
    "clip_text_model": TEXT,
    "t5": {"d_model": 32, "num_layers": LAYERS, "num_heads": 2, "d_ff": 64, "d_kv": 16},
    "bart": PAIR,
    "whisper": WHISPER,
    "vit": VISION,
    "deit": VISION,
    "clip_vision_model": VISION,
    "swin": {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
    "wav2vec2": {**TEXT, "conv_dim": [16, 16], "conv_kernel": [10, 3], "conv_stride": [5, 2], "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4},
}  # fmt: skip
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
EVERY_MERGE = ("bert", "vit")
# It makes a tensor of a length and slices by it, which torch can't trace for every length: one trace for each, none for a mask.
A_TRACE_FOR_EACH_LENGTH = {"deberta": 4}


def loaded(folder: Path, fields: Mapping[str, object]) -> LoadedModel:
    path = folder / "config.json"
    path.write_text(json.dumps(fields))
    return load_model(str(path))


def stitched_like_eager(model: LoadedModel) -> StitchedModule:
    eager = model.run(0)
    stitched = model.stitch(EAGER)
    result = compare(eager, model.run(0, stitched))
    assert result.agree, result.text(eager)
    return stitched


@pytest.mark.sample(13)  # bert and vit
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family(family: str, tmp_path: Path) -> None:
    model = loaded(tmp_path, {"model_type": family, **FAMILIES[family]})
    assert len(model.more_calls) == len(SIZES) - 1
    stitched = stitched_like_eager(model)
    assert len(stitched.traces) <= A_TRACE_FOR_EACH_LENGTH.get(family, 2), "rows, and a single row"
    if family in EVERY_MERGE:
        assert "cut between repeated blocks" in str(stitched.report())


@pytest.mark.nightly
@pytest.mark.parametrize("name", CLASSES)
def test_a_diffusion_transformer(name: str, tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    model = loaded(tmp_path, {"_class_name": name, **CLASSES[name]})
    shapes = {each[1]["hidden_states"].shape[1:] for each in model.more_calls}  # type: ignore[attr-defined]
    assert len(model.more_calls) == 4 and len(shapes) == 2
    assert all(bool(each.abs().max() > 0) for each in model.run(0).values)
    assert len(stitched_like_eager(model).traces) <= 3


MASKS = (
    *(torch.ones(3, 9), torch.ones(3, 9).tril(6), torch.ones(2, 15).tril(10).flip(1)),
    *(torch.tensor([[1.0] * 5, [1.0, 0, 1, 0, 1]]), torch.ones(6, 30), torch.ones(4, 12)),
)


def test_masks_of_ones_and_others_take_turns_without_a_trace_for_each(tmp_path: Path) -> None:
    """In eager a mask of ones is left out, by its values; in a trace it may not be."""
    model = loaded(tmp_path, {"model_type": "bert", **TEXT})
    assert not bool(model.example_kwargs["attention_mask"].all())  # type: ignore[attr-defined]
    stitched = stitched_like_eager(model)
    traces = len(stitched.traces)
    for mask in (*MASKS, *reversed(MASKS)):
        given = {"input_ids": torch.randint(3, 99, mask.shape), "attention_mask": mask.long()}
        with torch.no_grad():
            want, got = model.module(**given), stitched(**given)  # type: ignore[operator]
        torch.testing.assert_close(got.last_hidden_state, want.last_hidden_state)
        hidden = want.last_hidden_state - model.module(given["input_ids"]).last_hidden_state  # type: ignore[operator]
        assert bool(mask.all()) == (hidden.abs().max() < 1e-4), "these masks tell nothing"
    assert len(stitched.traces) == traces


@pytest.mark.sample(3)
@pytest.mark.parametrize("family", EVERY_MERGE)
def test_saved_and_loaded_for_another_model_of_its_class(family: str, tmp_path: Path) -> None:
    fields = {"model_type": family, **FAMILIES[family]}
    stitched_like_eager(loaded(tmp_path, fields)).save(tmp_path / "artifact")
    other = loaded(tmp_path, fields)
    traced = piecework.counters.num_graphs_seen
    warm = other.warm(tmp_path / "artifact")
    result = compare(other.run(0), other.run(0, warm))
    assert result.agree and piecework.counters.num_graphs_seen == traced
    args, kwargs = other.example_args, other.example_kwargs
    assert type(warm(*args, **kwargs)) is type(other.module(*args, **kwargs))


SMALL = {**TEXT, "num_hidden_layers": 1}
SMALL_PAIR = {**PAIR, "encoder_layers": 1}
DECIDED = [
    ("bert", [], {}, "BertModel"),
    ("bert", ["BertForMaskedLM"], {}, "BertModel"),
    ("bert", ["BertLMHeadModel"], {"is_decoder": True}, "BertLMHeadModel"),
    ("bert", [], {"is_decoder": True}, "BertLMHeadModel"),
    ("bart", [], {}, "BartEncoder"),
    ("bart", ["BartForConditionalGeneration"], {}, "BartEncoder"),
    ("bart", ["BartForCausalLM"], {}, "BartForCausalLM"),
    ("llama", ["LlamaForCausalLM"], {}, "LlamaForCausalLM"),
    ("llama", [], {}, "LlamaForCausalLM"),
]


@pytest.mark.parametrize(("family", "named", "fields", "found"), DECIDED)
def test_the_config_decides(
    family: str, named: list[str], fields: dict[str, object], found: str, tmp_path: Path
) -> None:
    sizes = SMALL_PAIR if family == "bart" else SMALL
    said = {"model_type": family, **({"architectures": named} if named else {}), **fields}
    assert loaded(tmp_path, {**sizes, **said}).name == found


REFUSED = [
    ({"model_type": "bert", "architectures": ["BertLMHeadModel"]}, "not clear whether"),
    ({"model_type": "bert", "architectures": ["BertModel"], "is_decoder": True}, "is_decoder is True"),
    ({"model_type": "bart", "architectures": ["BartForCausalLM", "BartModel"]}, "not clear whether"),
    ({"model_type": "nope"}, "is no model config of transformers .*nope"),
    ({"model_type": "llava"}, "neither a causal LM nor called once"),
    ({"model_type": "bert", "hidden_size": 30, "num_attention_heads": 4}, "no model can be made"),
    ({"_class_name": "FluxPipelineOfMine"}, "has no model 'FluxPipelineOfMine'"),
    ({"_class_name": "DiTTransformer2DModel", **LATENTS, "norm_type": "none"}, "no model can be made"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "says"), REFUSED)
def test_what_is_ambiguous_or_unknown_is_said(
    fields: dict[str, object], says: str, tmp_path: Path
) -> None:
    if "_class_name" in fields:
        pytest.importorskip("diffusers")
    with pytest.raises(UsageError, match=says):
        loaded(tmp_path, fields)


def test_a_model_with_unknown_arguments_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers.BertModel, "forward", lambda self, somewhat: somewhat)
    with pytest.raises(UsageError, match=r"no arguments are known that a BertModel takes.*"):
        loaded(tmp_path, {"model_type": "bert", **SMALL})


def test_diffusers_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="needs diffusers") as raised:
        loaded(tmp_path, {"_class_name": "DiTTransformer2DModel", **LATENTS})
    assert "pip install 'piecework[diffusers]'" in str(raised.value)
