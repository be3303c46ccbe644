"""Decoders that are served whole: tokens, scores and caches are the model's own, and what can't be carried is refused or left to the model's own forward."""

from __future__ import annotations

import logging

import pytest
import torch
from models import EAGER
from small_llms import GENERATIONS, Around, Pair, build
from torch import nn

from piecework.bench.lists.generation import Family, causal_lms, encoder_decoders, try_family
from piecework.bench.lists.trial import Options
from piecework.errors import ConfigError, InputError, StaticGraphError, UsageError
from piecework.integrations.transformers import how_served, stitch, stitched_module
from piecework.runtime.counters import counters

transformers = pytest.importorskip("transformers")

IDS = torch.randint(3, 97, (3, 6), generator=torch.Generator().manual_seed(5))


def whole(
    family: str = "bloom", way: object = None, around: object = None, **fields: object
) -> Pair:
    """A model twice, once stitched whole; ``around``: what a layer of its second block is given."""
    model = build(family, norms=1.0, **fields)
    if around is not None:
        model.transformer.h[1].mlp = Around(model.transformer.h[1].mlp, around)
    pair = Pair(model, way=way)
    assert how_served(pair.stitched).way == "whole"
    return pair


@pytest.fixture(scope="module")
def pair() -> Pair:
    return whole()


WAYS = {**GENERATIONS, "greedy": {}, "sampled beams": {"num_beams": 2, "do_sample": True}}


@pytest.mark.parametrize("how", WAYS.values(), ids=WAYS.keys())
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_generation(pair: Pair, batch: int, how: dict[str, object]) -> None:
    pair.generate(IDS[:batch], 2 * batch - 2, **how)  # of the last row 0, 2 or 4 are hidden
    assert not how_served(pair.stitched).as_it_is


def test_embeddings_in_the_place_of_ids(pair: Pair) -> None:
    embeds, mask = pair.eager.get_input_embeddings()(IDS).detach(), torch.ones_like(IDS)
    for rows in (3, 2, 3):
        pair.call(inputs_embeds=embeds[:rows], attention_mask=mask[:rows])
    pair.generate(IDS, inputs_embeds=embeds)
    assert not how_served(pair.stitched).as_it_is


def test_every_length_is_served_by_the_same_traces(pair: Pair) -> None:
    for length in (6, 2):
        pair.generate(IDS[:2, :length], max_new_tokens=4)
    with counters.expect(num_graphs_seen=0):
        for length in (3, 5):
            pair.generate(IDS[:3, :length], max_new_tokens=9)


@pytest.mark.nightly
def test_a_mask_for_each_type_of_layer() -> None:
    model = whole("lfm2", full_attn_idxs=[1])
    mask = torch.ones_like(IDS[:2])
    mask[1, :2] = 0
    model.generate(IDS[:2], attention_mask=mask, cache_implementation="static", max_new_tokens=3)
    assert not how_served(model.stitched).as_it_is
    strange = {"full_attention": None, "conv": [mask]}
    with torch.no_grad(), pytest.raises(InputError, match="attention_mask"):
        model.stitched(IDS[:2], attention_mask=strange)


CHANGES = {
    "nothing": lambda cache: None,
    "reordered": lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])),
    "cropped": lambda cache: cache.crop(-2),
    "repeated": lambda cache: cache.batch_repeat_interleave(2),
    "selected": lambda cache: cache.batch_select_indices(torch.tensor([1, 2])),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("make", ["with its config", "empty"])
def test_caches_that_are_changed_between_steps(pair: Pair, make: str, change: object) -> None:
    given = {"config": pair.eager.config} if make == "with its config" else {}
    caches = [transformers.DynamicCache(**given) for _ in range(2)]
    got, _ = pair.call(IDS, past_key_values=caches)
    assert got.past_key_values is caches[0]
    held = caches[0].layers[0].keys
    for cache in caches:
        change(cache)
    batch = caches[0].layers[0].keys.shape[0]
    for step in range(2):
        pair.call(IDS[:1, step : step + 1].expand(batch, 1), past_key_values=caches)
    assert held.shape[2] == IDS.shape[1]


OTHERS = {
    "no cache at all": ("bert", {}),
    "attention of its own": ("codegen", {"rotary_dim": 4}),
    "convolutions": ("lfm2", {"layer_types": ["conv", "full_attention"]}),
}


@pytest.mark.nightly
@pytest.mark.parametrize(("family", "fields"), OTHERS.values(), ids=OTHERS.keys())
def test_others(family: str, fields: dict[str, object]) -> None:
    pair = whole(family, **fields)
    pair.generate(IDS, 3)
    pair.generate(IDS[:1])
    assert not how_served(pair.stitched).as_it_is


@pytest.mark.nightly
def test_recurrent_prompts_run_as_they_are() -> None:
    """A loop over tokens is one graph for each length; steps are not."""
    pair = whole("mamba", state_size=8)
    pair.generate(IDS[:2])
    served = how_served(pair.stitched)
    assert list(served.as_it_is.values()) == [1]
    assert "one length alone" in str(served)
    with counters.expect(num_graphs_seen=0):
        pair.generate(IDS[:2, :4])


@pytest.mark.nightly
def test_windows_and_counts() -> None:
    """Layers that count their tokens in Python: before the window is full and after it."""
    pair = whole("mistral", "whole", sliding_window=4)
    pair.generate(IDS[:2, :2], max_new_tokens=8)
    pair.generate(IDS[:2], max_new_tokens=3)
    with counters.expect(num_graphs_seen=0):
        pair.generate(IDS[:3], max_new_tokens=6)
    assert not how_served(pair.stitched).as_it_is


def test_static_caches() -> None:
    pair = whole("llama", "whole")
    pair.generate(IDS[:2], cache_implementation="static", max_new_tokens=4)
    assert not how_served(pair.stitched).as_it_is


def test_layers_are_compiled_once() -> None:
    """Two different blocks: the first has the embeddings and masks before it in a piece of its own."""
    model = stitch(build("bloom", num_hidden_layers=5), config=EAGER)
    for entry in ("input_ids", "decode"):
        report = stitched_module(model, entry).report()
        assert report.pieces > 5 > report.unique


class Strange(transformers.DynamicCache):
    """A class of the user's."""


TWO = transformers.EncoderDecoderCache(transformers.DynamicCache(), transformers.DynamicCache())
REFUSED = {
    "attentions": ({"output_attentions": True}, "output_attentions"),
    "hidden states": ({"output_hidden_states": True}, "output_hidden_states"),
    "something unknown": ({"head_bias": 1.0}, "head_bias"),
    "no token ids": ({"input_ids": torch.ones(2, 3)}, "of integers"),
    "a cache of another class": ({"past_key_values": Strange()}, "Strange"),
    "caches of two": ({"past_key_values": TWO}, "EncoderDecoderCache"),
}


@pytest.mark.parametrize(("given", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_calls_that_are_refused(pair: Pair, given: dict[str, object], reason: str) -> None:
    with torch.no_grad(), pytest.raises(InputError, match=reason):
        pair.stitched.transformer(**{"input_ids": IDS, **given})


def needs_data(_: Around, states: torch.Tensor) -> torch.Tensor:
    """Reads a number out of a tensor where there is a single sequence, which no graph can."""
    return states * 2 if states.shape[0] == 1 and float(states.sum()) > 1e9 else states


def test_kinds_of_calls_that_no_graph_holds(caplog: pytest.LogCaptureFixture) -> None:
    pair = whole(around=needs_data)
    pair.generate(IDS[:2])
    assert not how_served(pair.stitched).as_it_is
    with caplog.at_level(logging.WARNING, "piecework"):
        pair.generate(IDS[:1])
    assert "runs as it is for one sequence" in caplog.text
    assert sum(how_served(pair.stitched).as_it_is.values()) == 6
    assert "as it is" in str(how_served(pair.stitched))


def differs(_: Around, states: torch.Tensor) -> torch.Tensor:
    """Something else while it is compiled for a single sequence."""
    return states * 1.5 if torch.compiler.is_compiling() and states.shape[0] == 1 else states


def test_kinds_of_calls_that_would_differ() -> None:
    pair = whole(around=differs)
    pair.generate(IDS[:1])
    assert all("differs" in why for why in how_served(pair.stitched).as_it_is)


def test_no_static_graphs_and_no_such_way(pair: Pair) -> None:
    model = build("bloom")
    with pytest.raises(StaticGraphError, match="whole"):
        stitch(model, config=EAGER, capture=[1, 2])
    assert "forward" not in vars(model.transformer)
    with pytest.raises(StaticGraphError):
        stitched_module(pair.stitched, "decode").capture([2, 4], progress=False)
    with pytest.raises(ConfigError, match="no way"):
        stitch(model, way="round")  # type: ignore[arg-type]


def test_entries(pair: Pair) -> None:
    prompts, steps = (stitched_module(pair.stitched, each) for each in ("input_ids", "decode"))
    assert "BloomModel" in prompts.source.code != steps.source.code
    with pytest.raises(UsageError, match="no entry"):
        stitched_module(pair.stitched, "pixel_values")


def test_weights(pair: Pair) -> None:
    mine, own = (each.transformer.h[0].mlp.dense_h_to_4h for each in (pair.stitched, pair.eager))
    with torch.no_grad():
        for each in (mine, own):
            each.weight.mul_(1.25)
    pair.generate(IDS[:2])
    kept = mine.weight
    mine.weight = nn.Parameter(kept.detach() * 2)
    with torch.no_grad(), pytest.raises(InputError, match="replaced"):
        pair.stitched(IDS[:2])
    mine.weight = kept
    pair.generate(IDS[:2])


def test_while_the_compiler_is_off() -> None:
    with torch.compiler.set_stance("force_eager"), counters.expect(num_graphs_seen=0):
        pair = whole()
        pair.generate(IDS[:2])
    assert not how_served(pair.stitched).modules
    pair.generate(IDS[:2])
    assert how_served(pair.stitched).modules


FAMILIES = [Family(row.name) for row in causal_lms()]
PAIRS = [Family(row.name, pair=True) for row in encoder_decoders()]


@pytest.mark.sample(80)
@pytest.mark.parametrize("family", [*FAMILIES, *PAIRS], ids=lambda family: family.name)
def test_families(family: Family) -> None:
    """Equal, or refused by name; which it is says the page of the documentation."""
    found = try_family(family, Options("eager"))
    assert found.skipped or found.verdicts["piecework"].status in ("equal", "refused"), found
    equal = not found.skipped and found.verdicts["piecework"].status == "equal"
    assert found.way in (("flat", "whole") if equal else ("",))
