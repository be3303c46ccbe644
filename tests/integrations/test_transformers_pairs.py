"""Encoder-decoders: decoder and encoder are each served whole, and ``generate`` gives eager's tokens and caches."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from models import EAGER
from small_llms import GENERATIONS, Pair, build
from torch import nn

from piecework.errors import CaptureError, InputError
from piecework.integrations.transformers import how_served, load, save, stitch, stitched_module
from piecework.runtime.counters import counters

transformers = pytest.importorskip("transformers")

IDS = torch.randint(3, 97, (3, 7), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module", params=["t5", pytest.param("bart", marks=pytest.mark.nightly)])
def pair(request: pytest.FixtureRequest) -> Pair:
    return Pair(build(request.param, norms=1.0))


WAYS = {
    **GENERATIONS,
    "static": {"cache_implementation": "static"},
    "a prompt": {"decoder_input_ids": torch.tensor([[1, 5, 9], [1, 6, 7], [1, 4, 4]])},
}


@pytest.mark.nightly
@pytest.mark.parametrize("how", WAYS.values(), ids=WAYS.keys())
def test_generation(pair: Pair, how: dict[str, object]) -> None:
    pair.generate(IDS, padded=2, **how)
    assert not how_served(pair.stitched).as_it_is


def test_lengths_batches_and_padding_need_no_more_traces(pair: Pair) -> None:
    pair.generate(IDS)
    pair.generate(IDS[:1])
    with counters.expect(num_graphs_seen=0):
        for batch, length, padded in ((2, 3, 1), (3, 5, 0), (2, 7, 3), (1, 4, 0)):
            pair.generate(IDS[:batch, :length], padded)


def test_both_stacks_are_stitched(pair: Pair) -> None:
    pair.generate(IDS)
    served = how_served(pair.stitched)
    assert "encoder's states" in served.not_flat
    assert {name.startswith("encoder: ") for name in served.modules} == {True, False}
    encoder = stitched_module(pair.stitched, "encoder")
    assert encoder in served.modules.values()
    assert stitched_module(pair.stitched) is not encoder


@pytest.mark.nightly
def test_an_artifact_has_both(pair: Pair, tmp_path: Path) -> None:
    pair.generate(IDS)
    save(pair.stitched, tmp_path / "pair")
    loaded = copy.copy(pair)
    with counters.expect(num_graphs_seen=0):
        loaded.stitched = load(tmp_path / "pair", copy.deepcopy(pair.eager))
        loaded.generate(IDS)
    before, now = how_served(pair.stitched), how_served(loaded.stitched)
    assert (now.not_flat, now.modules.keys()) == (before.not_flat, before.modules.keys())


@pytest.mark.nightly
def test_an_encoder_that_can_not_be_stitched_stays_as_it_is() -> None:
    class Branches(nn.Identity):
        def forward(self, states: torch.Tensor) -> object:
            return states if bool(states.isfinite().any()) else None

    model = build("bart", norms=1.0)
    layer = model.model.encoder.layers[0]
    layer.fc1 = nn.Sequential(layer.fc1, Branches())
    pair = Pair(model)
    pair.generate(IDS)
    assert not any(name.startswith("encoder") for name in how_served(pair.stitched).modules)
    assert "forward" not in vars(pair.stitched.get_encoder())


def test_a_model_that_generates_from_sound_is_refused() -> None:
    sizes = {"d_model": 32, "num_mel_bins": 8, "max_source_positions": 20, "vocab_size": 97}
    layers = {f"{part}_layers": 1 for part in ("encoder", "decoder")}
    heads = {f"{part}_attention_heads": 4 for part in ("encoder", "decoder")}
    ends = {"eos_token_id": 2, "bos_token_id": 1, "decoder_start_token_id": 3, "pad_token_id": 0}
    config = transformers.WhisperConfig(**sizes | layers | heads | ends)
    model = transformers.WhisperForConditionalGeneration(config).eval()
    with pytest.raises(CaptureError, match="generates from input_features") as raised:
        stitch(model, config=EAGER)
    assert "encoder_outputs" in raised.value.hint


def test_what_is_refused(pair: Pair) -> None:
    with pytest.raises(CaptureError, match="encoder's states"):
        stitch(build("t5"), config=EAGER, way="flat")
    with torch.no_grad(), pytest.raises(InputError, match="output_attentions"):
        pair.stitched(IDS, decoder_input_ids=IDS[:, :2], output_attentions=True)
