"""What a request may bring to a stitched model: caches, masks, embeddings, beams; each must change nothing but the speed."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import EAGER
from small_llms import GEMMA, GENERATIONS, Pair
from small_llms import build as built

from piecework.errors import InputError, PieceworkError, UsageError
from piecework.integrations.transformers import how_served, stitch, stitched_module, unstitch
from piecework.integrations.transformers.request.state import (
    STATE_KEY,
    dry_request,
    request_context,
)
from piecework.runtime.batch.descriptor import BatchKind
from piecework.runtime.batch.forward_context import (
    ForwardContext,
    get_forward_context,
    override_forward_context,
    set_forward_context,
)
from piecework.runtime.counters import counters

transformers = pytest.importorskip("transformers")


def build(family: str = "gemma3_text", **fields: object) -> torch.nn.Module:
    """By default a model with windowed layers on both sides of a full one."""
    turns = ["sliding_attention", "full_attention", "sliding_attention"]
    extra = {**GEMMA, "layer_types": turns} if family == "gemma3_text" else {}
    return built(family, **{"num_hidden_layers": 3, **extra, **fields})


IDS = torch.randint(1, 97, (2, 9), generator=torch.Generator().manual_seed(5))
MASK = torch.ones_like(IDS)
MASK[0, :3] = 0


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    pair = Pair(build())
    before = stitched_module(pair.stitched)
    yield pair
    assert stitched_module(pair.stitched) is before


OTHERS = {
    "static": {"cache_implementation": "static"},
    "beams for each": {"num_return_sequences": 2, "num_beams": 2},
    **{"chunks": {"prefill_chunk_size": 4}, "no mask": {"attention_mask": None}},
    **{"lookup": {"prompt_lookup_num_tokens": 2}, "assisted": {"assistant_model": build()}},
}


@pytest.mark.parametrize("way", [*GENERATIONS, *OTHERS])
def test_generation_equals_eager(pair: Pair, way: str) -> None:
    alone = way in ("lookup", "assisted")  # which are for one sequence
    how = {**({} if alone else {"attention_mask": MASK}), **(GENERATIONS | OTHERS)[way]}
    done = pair.generate(IDS[:1] if alone else IDS, max_new_tokens=12, **how)
    assert done.sequences[:, 9:].unique().numel() > 1, "the model says the same always"


@pytest.mark.parametrize("cache", [None, "static"])
def test_a_prompt_of_one_token(pair: Pair, cache: str | None) -> None:
    """Its first forward looks like a decode step, of a cache that has no tensors yet."""
    for ids in (IDS[:, 8:], IDS[:1, 8:]):
        pair.generate(ids, cache_implementation=cache)


def test_mask_forms(pair: Pair) -> None:
    later = torch.ones(9, 9, dtype=torch.bool).tril()
    four = later.expand(2, 1, 9, 9)
    additive = torch.zeros(2, 1, 9, 9).masked_fill(~later, torch.finfo(torch.float32).min)
    by_type = {"full_attention": four, "sliding_attention": additive}
    for mask in (MASK, MASK.bool(), four, additive, by_type):
        pair.call(IDS, attention_mask=mask)


def test_given_positions_and_packed_sequences(pair: Pair) -> None:
    pair.call(IDS, position_ids=torch.arange(5, 14).unsqueeze(0))
    pair.call(IDS, position_ids=torch.arange(5.0, 14.0).unsqueeze(0))
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1], [0, 1, 2, 3, 4, 5, 6, 7, 8]])
    pair.call(IDS, position_ids=packed, use_cache=False)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_prefill_in_chunks_continues_the_cache(pair: Pair, kind: str) -> None:
    def cache() -> transformers.Cache:
        if kind == "dynamic":
            return transformers.DynamicCache(config=pair.eager.config)
        return transformers.StaticCache(config=pair.eager.config, max_cache_len=16)

    caches = cache(), cache()
    for start, stop in ((0, 4), (4, 8), (8, 9)):
        given = {"attention_mask": MASK[:, :stop], "past_key_values": caches}
        got, _ = pair.call(IDS[:, start:stop], **given)
        assert got.past_key_values is caches[0]


def test_embeddings_are_a_second_entry(pair: Pair) -> None:
    ids_entry = stitched_module(pair.stitched)
    with torch.no_grad():
        embeds = pair.eager.get_input_embeddings()(IDS)
    pair.call(inputs_embeds=embeds, attention_mask=MASK)
    entry = stitched_module(pair.stitched, "inputs_embeds")
    assert entry is not ids_entry
    pair.call(inputs_embeds=embeds[:1, :4])
    assert stitched_module(pair.stitched, "inputs_embeds") is entry


def test_output_forms(pair: Pair) -> None:
    with torch.no_grad():
        ours, theirs = pair.stitched(IDS, return_dict=False), pair.eager(IDS, return_dict=False)
        assert len(ours) == len(theirs) == 2
        torch.testing.assert_close(ours[0], theirs[0])
        assert pair.stitched(IDS, logits_to_keep=1).logits.shape == (2, 1, 97)
        inner, other = pair.stitched.model(IDS), pair.eager.model(IDS)
        assert type(inner) is type(other)
        torch.testing.assert_close(inner.last_hidden_state, other.last_hidden_state)
        assert inner.past_key_values.get_seq_length() == 9
        loss = pair.stitched(IDS, labels=IDS).loss
        torch.testing.assert_close(loss, pair.eager(IDS, labels=IDS).loss)
        assert pair.stitched(IDS, use_cache=False).past_key_values is None


def test_attention_implementation_can_change_after_stitching() -> None:
    pair = Pair(build("llama"))
    entry = stitched_module(pair.stitched)
    for implementation in ("eager", "sdpa"):
        for model in (pair.eager, pair.stitched):
            model.set_attn_implementation(implementation)
        pair.call(IDS)
    assert stitched_module(pair.stitched) is entry


ROPES = {
    "longrope": {
        **{"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4},
        "long_factor": [4.0, 3.0, 2.0, 2.0],
        **{"original_max_position_embeddings": 8, "factor": 8.0},
    },
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
}


@pytest.mark.parametrize("rope_type", ROPES)
def test_rotary_frequencies_that_change_with_the_length(rope_type: str) -> None:
    family, longest = ("phi3", 64) if rope_type == "longrope" else ("llama", 8)
    pair = Pair(build(family, rope_parameters=ROPES[rope_type], max_position_embeddings=longest))
    generator = torch.Generator().manual_seed(4)
    for length in (6, 20, 30, 6, 12):
        pair.call(torch.randint(1, 97, (2, length), generator=generator))
    pair.generate(IDS[:, :5], max_new_tokens=12)


@pytest.mark.parametrize(("family", "way"), [("llama", "flat"), ("bloom", "whole")])
def test_unstitch_restores_the_model(family: str, way: str) -> None:
    model = build(family)
    attributes = {id(module): set(module.__dict__) for module in model.modules()}
    config, implementation = copy.deepcopy(model.config), model.config._attn_implementation
    with torch.no_grad():
        expected = model(IDS).logits
    assert how_served(stitch(model, config=EAGER)).way == way
    assert unstitch(model) is model
    assert {id(module): set(module.__dict__) for module in model.modules()} == attributes
    assert (model.config, model.config._attn_implementation) == (config, implementation)
    logits = model(IDS).logits
    assert torch.equal(logits, expected) and logits.requires_grad


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"output_hidden_states": True}, "output_hidden_states"),
        ({"output_attentions": True}, "output_attentions"),
        ({"token_type_ids": torch.zeros(2, 9, dtype=torch.long)}, "token_type_ids"),
        ({"is_causal": False}, "is_causal"),
        ({"position_ids": torch.zeros(3, 2, 9, dtype=torch.long)}, "position_ids"),
        ({"past_key_values": ((torch.zeros(1), torch.zeros(1)),)}, "past_key_values"),
        ({"position_ids": torch.arange(9)[None] / 2}, "a tensor of integers"),
        ({"position_ids": [[*range(9)]]}, "position_ids is list"),
        ({"inputs_embeds": torch.zeros(2, 9, 32)}, "exactly one"),
        ({"input_ids": torch.ones(2, 9)}, "of integers"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_requests_that_cannot_be_served(pair: Pair, given: dict[str, object], named: str) -> None:
    with torch.no_grad(), pytest.raises(InputError, match=named) as caught:
        pair.stitched.model(**{"input_ids": IDS, **given})
    assert caught.value.where


def test_gradients_training_and_autocast_are_refused(pair: Pair) -> None:
    with pytest.raises(InputError, match="gradients are enabled"):
        pair.stitched(IDS)
    with torch.no_grad():
        with pytest.raises(InputError, match="empty"):
            pair.stitched(IDS[:, :0])
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(InputError, match="autocast"):
            pair.stitched(IDS)
        pair.stitched.train()
        try:
            with pytest.raises(InputError, match="training mode"):
                pair.stitched(IDS)
        finally:
            pair.stitched.eval()
    frozen = copy.deepcopy(pair.eager).requires_grad_(False)
    stitch(frozen, config=EAGER)
    assert frozen(IDS).logits.shape == (2, 9, 97)


@pytest.mark.parametrize("cache", [None, "static"])
def test_two_threads_share_one_stitched_model(pair: Pair, cache: str | None) -> None:
    generator = torch.Generator().manual_seed(9)
    prompts = [torch.randint(1, 97, (1 + n % 3, 4 + n), generator=generator) for n in range(6)]

    def answer(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
        how = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": cache}
        return model.generate(ids, **how)

    with ThreadPoolExecutor(2) as pool:
        ours = list(pool.map(lambda ids: answer(pair.stitched, ids), prompts))
    for ids, got in zip(prompts, ours, strict=True):
        assert torch.equal(got, answer(pair.eager, ids))


def test_a_moved_model_is_noticed() -> None:
    model = stitch(build("llama"), config=EAGER).to(torch.bfloat16)
    ids = torch.ones(1, 3, dtype=torch.long)
    with torch.no_grad(), pytest.raises(InputError, match="stitched as"):
        model(ids)
    stitch(unstitch(model), config=EAGER)
    with torch.no_grad():
        assert model(ids).logits.dtype == torch.bfloat16


def test_saving_and_copying(pair: Pair, tmp_path: Path) -> None:
    pair.stitched.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, pair.eager(IDS).logits)
    assert set(pair.stitched.state_dict()) == set(pair.eager.state_dict())
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(UsageError, match="copied or pickled"):
            copied(pair.stitched)


def test_torch_s_switches_run_the_decoder_as_it_is():
    """Off, nothing is compiled; on again, it is; ``force_eager`` later runs the model's own forward, in the middle of a request too."""
    eager = build()
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        model = stitch(copy.deepcopy(eager), config=EAGER)
        before = counters.num_graphs_seen
        assert torch.equal(model(IDS).logits, eager(IDS).logits)
        with pytest.raises(PieceworkError, match="force_eager"):
            _ = stitched_module(model).source
    assert counters.num_graphs_seen == before
    expected = eager.generate(IDS, max_new_tokens=8, do_sample=False)
    with torch.no_grad():
        out = model(IDS)
        assert stitched_module(model).source.code
        with torch.compiler.set_stance("force_eager"):
            grown = model(IDS[:, :1], past_key_values=out.past_key_values)
            with torch.enable_grad():
                assert model(IDS).logits.requires_grad  # as the model's own forward gives them
        again = model(IDS[:, :1], past_key_values=grown.past_key_values)
        full = eager(torch.cat([IDS, IDS[:, :1], IDS[:, :1]], dim=1))
        torch.testing.assert_close(again.logits[:, -1], full.logits[:, -1], rtol=1e-4, atol=1e-4)
    assert torch.equal(model.generate(IDS, max_new_tokens=8, do_sample=False), expected)
    with torch.no_grad(), torch.compiler.set_stance("eager_on_recompile"):
        # The stitched forward refuses another weight; the flattened one runs as it is.
        for each in (model, eager):
            each.model.norm.weight = torch.nn.Parameter(torch.full((32,), 0.5))
        torch.testing.assert_close(model(IDS).logits, eager(IDS).logits, rtol=1e-4, atol=1e-4)
    with torch.no_grad(), torch._dynamo.config.patch(disable=True):
        embeds = model.get_input_embeddings()(IDS)  # an entry that is not compiled yet
        torch.testing.assert_close(model(inputs_embeds=embeds).logits, eager(IDS).logits)


def test_what_an_engine_says_of_the_batch_reaches_the_dispatcher() -> None:
    """A batch with adapters is not served from the graph without them, and what is dry stays dry."""
    model = stitch(build("llama"), config=EAGER)
    entry = stitched_module(model)
    ids = torch.tensor([[5, 6, 7, 8]])
    how = {"context_for": dry_request, "pad": True, "lora_counts": (1,), "progress": False}
    entry.capture([4], estimate=False, **how)
    with torch.no_grad():
        with set_forward_context(batch=BatchKind(has_lora=True, num_active_loras=1)):
            model(ids)
        model(ids)
    calls = {row.graph: row.calls for row in entry.call_report()}
    assert calls == {"tokens=4": 1, "tokens=4 loras=1": 1}
    kept = ForwardContext(batch=BatchKind(uniform_decode=True), dry=True, state={"mine": 1})
    with override_forward_context(kept), request_context("a request"):
        inner = get_forward_context()
        assert inner == replace(kept, state={"mine": 1, STATE_KEY: "a request"})
