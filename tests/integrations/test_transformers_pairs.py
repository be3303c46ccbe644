"""Encoder-decoders: decoder and encoder are each served whole, and ``generate`` gives eager's tokens and caches."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from small_llms import scatter
from torch import nn

from piecework.bench.lists.generation import Family, encoder_decoders, try_family
from piecework.bench.lists.trial import Options
from piecework.errors import CaptureError, InputError
from piecework.integrations.transformers import how_served, load, save, stitch, stitched_module
from piecework.runtime.config.compilation import CompilationConfig
from piecework.runtime.counters import counters

transformers = pytest.importorskip("transformers")

EAGER_PIECES = CompilationConfig(backend="eager")
GENERATOR = torch.Generator().manual_seed(3)
IDS = torch.randint(3, 97, (3, 7), generator=GENERATOR)
ENDS = {"vocab_size": 97, "pad_token_id": 0, "eos_token_id": None, "decoder_start_token_id": 1}
CONFIGS = {
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4},
    "bart": {
        **{"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "forced_eos_token_id": None},
        **{f"{part}_attention_heads": 4 for part in ("encoder", "decoder")},
        **{f"{part}_ffn_dim": 48 for part in ("encoder", "decoder")},
        **{"max_position_embeddings": 64},
    },
}


def build(family: str) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[family](**ENDS, **CONFIGS[family])
    return scatter(
        transformers.AutoModelForSeq2SeqLM.from_config(config, dtype=torch.float32).eval()
    )


NIGHTLY = pytest.mark.nightly


@pytest.fixture(scope="module", params=["t5", pytest.param("bart", marks=NIGHTLY)])
def models(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module]:
    made = build(request.param)
    return made, stitch(copy.deepcopy(made), config=EAGER_PIECES)


def same(
    models: tuple[nn.Module, nn.Module], ids: torch.Tensor = IDS, padded: int = 0, **how: object
) -> None:
    mask = torch.ones_like(ids)
    mask[-1, :padded] = 0
    how = {"do_sample": False, **how, "attention_mask": mask, "max_new_tokens": 6}
    found = []
    for model in models:
        torch.manual_seed(1)
        done = model.generate(ids, **how, return_dict_in_generate=True, output_scores=True)
        found.append(done)
    want, got = found
    assert torch.equal(got.sequences, want.sequences)
    for mine, their in zip(got.scores, want.scores, strict=True):
        torch.testing.assert_close(mine, their, rtol=1e-4, atol=1e-4)
    if want.past_key_values is None:
        assert got.past_key_values is None
        return
    assert type(got.past_key_values) is transformers.EncoderDecoderCache
    assert got.past_key_values.is_updated == want.past_key_values.is_updated
    for part in ("self_attention_cache", "cross_attention_cache"):
        mine, theirs = (getattr(each.past_key_values, part).layers for each in (got, want))
        for layer, their in zip(mine, theirs, strict=True):
            torch.testing.assert_close(layer.keys, their.keys, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(layer.values, their.values, rtol=1e-4, atol=1e-4)


GENERATIONS = {
    "sampled": {"do_sample": True, "top_k": 20},
    "beams": {"num_beams": 3},
    "several for each": {"num_return_sequences": 2, "do_sample": True},
    "no cache": {"use_cache": False},
    "static": {"cache_implementation": "static"},
    "a prompt for the decoder": {
        "decoder_input_ids": torch.tensor([[1, 5, 9], [1, 6, 7], [1, 4, 4]])
    },
}


@pytest.mark.nightly
@pytest.mark.parametrize("how", GENERATIONS.values(), ids=GENERATIONS.keys())
def test_generation(models: tuple[nn.Module, nn.Module], how: dict[str, object]) -> None:
    same(models, padded=2, **how)
    assert not how_served(models[1]).as_it_is


def test_lengths_batches_and_padding_need_no_more_traces(
    models: tuple[nn.Module, nn.Module],
) -> None:
    same(models)
    same(models, IDS[:1])
    with counters.expect(num_graphs_seen=0):
        for batch, length, padded in ((2, 3, 1), (3, 5, 0), (2, 7, 3), (1, 4, 0)):
            same(models, IDS[:batch, :length], padded)


def test_both_stacks_are_stitched(models: tuple[nn.Module, nn.Module]) -> None:
    same(models)
    served = how_served(models[1])
    assert "encoder's states" in served.not_flat
    assert {name.startswith("encoder: ") for name in served.modules} == {True, False}
    encoder = stitched_module(models[1], "encoder")
    assert encoder in served.modules.values()
    assert stitched_module(models[1]) is not encoder


@pytest.mark.nightly
def test_an_artifact_has_both(models: tuple[nn.Module, nn.Module], tmp_path: Path) -> None:
    same(models)
    save(models[1], tmp_path / "pair")
    with counters.expect(num_graphs_seen=0):
        loaded = load(tmp_path / "pair", copy.deepcopy(models[0]))
        same((models[0], loaded))
    assert "encoder's states" in how_served(loaded).not_flat
    assert how_served(loaded).modules.keys() == how_served(models[1]).modules.keys()


@pytest.mark.nightly
def test_an_encoder_that_can_not_be_stitched_stays_as_it_is() -> None:
    class Branches(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *args: object, **kwargs: object) -> object:
            made = self.inner(*args, **kwargs)
            return made if bool(made[0].isfinite().any()) else None

    model = build("bart")
    layer = model.model.encoder.layers[0]
    layer.fc1 = nn.Sequential(layer.fc1, Branches(nn.Identity()))
    stitched = stitch(copy.deepcopy(model), config=EAGER_PIECES)
    same((model, stitched))
    assert not any(name.startswith("encoder") for name in how_served(stitched).modules)
    assert "forward" not in vars(stitched.get_encoder())


def test_a_model_that_generates_from_sound_is_refused() -> None:
    sizes = {"d_model": 32, "num_mel_bins": 8, "max_source_positions": 20}
    layers = {f"{part}_layers": 1 for part in ("encoder", "decoder")}
    heads = {f"{part}_attention_heads": 4 for part in ("encoder", "decoder")}
    ends = {"eos_token_id": 2, "bos_token_id": 1, "decoder_start_token_id": 3}
    config = transformers.WhisperConfig(**ENDS | sizes | layers | heads | ends)
    model = transformers.WhisperForConditionalGeneration(config).eval()
    with pytest.raises(CaptureError, match="generates from input_features") as raised:
        stitch(model, config=EAGER_PIECES)
    assert "encoder_outputs" in raised.value.hint


def test_what_is_refused(models: tuple[nn.Module, nn.Module]) -> None:
    with pytest.raises(CaptureError, match="encoder's states"):
        stitch(build("t5"), config=EAGER_PIECES, way="flat")
    with torch.no_grad(), pytest.raises(InputError, match="output_attentions"):
        models[1](IDS, decoder_input_ids=IDS[:, :2], output_attentions=True)


@pytest.mark.nightly
@pytest.mark.parametrize("family", [row.name for row in encoder_decoders()])
def test_families(family: str) -> None:
    """Equal, or refused by name; which it is says the page of the documentation."""
    found = try_family(Family(family, pair=True), Options("eager"))
    assert found.skipped or found.verdicts["piecework"].status in ("equal", "refused"), found
