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
from small_llms import GEMMA
from small_llms import build as built

from piecework.errors import InputError, PieceworkError, UsageError
from piecework.integrations.transformers import stitch, stitched_module, unstitch
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
from piecework.runtime.config.compilation import CompilationConfig
from piecework.runtime.counters import counters

transformers = pytest.importorskip("transformers")

EAGER_PIECES = CompilationConfig(backend="eager")


def build(family: str = "gemma3_text", **fields: object) -> torch.nn.Module:
    """By default a model with windowed layers on both sides of a full one."""
    turns = ["sliding_attention", "full_attention", "sliding_attention"]
    extra = {**GEMMA, "layer_types": turns} if family == "gemma3_text" else {}
    return built(family, **{"num_hidden_layers": 3, **extra, **fields})


class Pair:
    """One model twice: as it is, and stitched."""

    def __init__(self) -> None:
        self.eager = build()
        self.stitched = stitch(copy.deepcopy(self.eager), config=EAGER_PIECES)
        self.ids = torch.randint(1, 97, (2, 9), generator=torch.Generator().manual_seed(5))
        self.mask = torch.ones_like(self.ids)
        self.mask[0, :3] = 0

    def check_logits(self, **given: object) -> None:
        with torch.no_grad():
            ours, theirs = self.stitched(**given).logits, self.eager(**given).logits
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)

    def check_generation(self, **how: object) -> None:
        settings = {"max_new_tokens": 8, "do_sample": False, "attention_mask": self.mask, **how}
        ours = self.stitched.generate(self.ids, **settings)
        theirs = self.eager.generate(self.ids, **settings)
        assert torch.equal(ours, theirs)
        assert (
            len(set(theirs[:, 9:].flatten().tolist())) > 2
        ), "the model says the same token always"


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    pair = Pair()
    before = stitched_module(pair.stitched)
    yield pair
    assert stitched_module(pair.stitched) is before


@pytest.mark.parametrize(
    "how",
    [
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"num_beams": 3},
        {"num_return_sequences": 2, "num_beams": 2},
        {"prefill_chunk_size": 4},
        {"attention_mask": None},
    ],
    ids=lambda how: "-".join(how),
)
def test_generation_equals_eager(pair: Pair, how: dict[str, object]) -> None:
    pair.check_generation(**how)


@pytest.mark.parametrize("cache", [None, "static"])
def test_a_prompt_of_one_token(pair: Pair, cache: str | None) -> None:
    """Its first forward looks like a decode step, of a cache that has no tensors yet."""
    how = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": cache}
    for ids in (pair.ids[:, 8:], pair.ids[:1, 8:]):
        assert torch.equal(pair.stitched.generate(ids, **how), pair.eager.generate(ids, **how))


def test_mask_forms(pair: Pair) -> None:
    later = torch.ones(9, 9, dtype=torch.bool).tril()
    four = later.expand(2, 1, 9, 9)
    additive = torch.zeros(2, 1, 9, 9).masked_fill(~later, torch.finfo(torch.float32).min)
    pair.check_logits(input_ids=pair.ids, attention_mask=pair.mask)
    pair.check_logits(input_ids=pair.ids, attention_mask=pair.mask.bool())
    pair.check_logits(input_ids=pair.ids, attention_mask=four)
    pair.check_logits(input_ids=pair.ids, attention_mask=additive)
    by_type = {"full_attention": four, "sliding_attention": additive}
    pair.check_logits(input_ids=pair.ids, attention_mask=by_type)


def test_given_positions_and_packed_sequences(pair: Pair) -> None:
    pair.check_logits(input_ids=pair.ids, position_ids=torch.arange(5, 14).unsqueeze(0))
    pair.check_logits(input_ids=pair.ids, position_ids=torch.arange(5.0, 14.0).unsqueeze(0))
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1], [0, 1, 2, 3, 4, 5, 6, 7, 8]])
    pair.check_logits(input_ids=pair.ids, position_ids=packed, use_cache=False)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_prefill_in_chunks_continues_the_cache(pair: Pair, kind: str) -> None:
    def cache() -> transformers.Cache:
        if kind == "dynamic":
            return transformers.DynamicCache(config=pair.eager.config)
        return transformers.StaticCache(config=pair.eager.config, max_cache_len=16)

    ours, theirs = cache(), cache()
    with torch.no_grad():
        for start, stop in ((0, 4), (4, 8), (8, 9)):
            ids, mask = pair.ids[:, start:stop], pair.mask[:, :stop]
            got = pair.stitched(ids, attention_mask=mask, past_key_values=ours)
            expected = pair.eager(ids, attention_mask=mask, past_key_values=theirs)
            torch.testing.assert_close(got.logits, expected.logits, rtol=1e-4, atol=1e-4)
            assert got.past_key_values is ours
    for mine, other in zip(ours.layers, theirs.layers, strict=True):
        torch.testing.assert_close(mine.keys, other.keys)
        torch.testing.assert_close(mine.values, other.values)


def test_embeddings_are_a_second_entry(pair: Pair) -> None:
    ids_entry = stitched_module(pair.stitched)
    with torch.no_grad():
        embeds = pair.eager.get_input_embeddings()(pair.ids)
    pair.check_logits(inputs_embeds=embeds, attention_mask=pair.mask)
    entry = stitched_module(pair.stitched, "inputs_embeds")
    assert entry is not ids_entry
    pair.check_logits(inputs_embeds=embeds[:1, :4])
    assert stitched_module(pair.stitched, "inputs_embeds") is entry


def test_output_forms(pair: Pair) -> None:
    with torch.no_grad():
        ours, theirs = pair.stitched(pair.ids, return_dict=False), pair.eager(
            pair.ids, return_dict=False
        )
        assert len(ours) == len(theirs) == 2
        torch.testing.assert_close(ours[0], theirs[0])
        assert pair.stitched(pair.ids, logits_to_keep=1).logits.shape == (2, 1, 97)
        inner, other = pair.stitched.model(pair.ids), pair.eager.model(pair.ids)
        assert type(inner) is type(other)
        torch.testing.assert_close(inner.last_hidden_state, other.last_hidden_state)
        assert inner.past_key_values.get_seq_length() == 9
        loss = pair.stitched(pair.ids, labels=pair.ids).loss
        torch.testing.assert_close(loss, pair.eager(pair.ids, labels=pair.ids).loss)
        assert pair.stitched(pair.ids, use_cache=False).past_key_values is None


def test_attention_implementation_can_change_after_stitching() -> None:
    eager = build("llama")
    stitched = stitch(copy.deepcopy(eager), config=EAGER_PIECES)
    entry = stitched_module(stitched)
    ids = torch.randint(1, 97, (2, 7), generator=torch.Generator().manual_seed(1))
    for implementation in ("eager", "sdpa"):
        for model in (eager, stitched):
            model.set_attn_implementation(implementation)
        with torch.no_grad():
            torch.testing.assert_close(
                stitched(ids).logits, eager(ids).logits, rtol=1e-4, atol=1e-4
            )
    assert stitched_module(stitched) is entry


ROPES = {
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0, 3.0, 2.0, 2.0],
        "original_max_position_embeddings": 8,
        "factor": 8.0,
    },
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
}


@pytest.mark.parametrize("rope_type", ROPES)
def test_rotary_frequencies_that_change_with_the_length(rope_type: str) -> None:
    family, longest = ("phi3", 64) if rope_type == "longrope" else ("llama", 8)
    eager = build(family, rope_parameters=ROPES[rope_type], max_position_embeddings=longest)
    stitched = stitch(copy.deepcopy(eager), config=EAGER_PIECES)
    generator = torch.Generator().manual_seed(4)
    for length in (6, 20, 30, 6, 12):
        ids = torch.randint(1, 97, (2, length), generator=generator)
        with torch.no_grad():
            ours, theirs = stitched(ids).logits, eager(ids).logits
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    grown = [
        model.generate(ids[:, :5], max_new_tokens=12, do_sample=False)
        for model in (stitched, eager)
    ]
    assert torch.equal(*grown)


def test_unstitch_restores_the_model() -> None:
    model = build("llama")
    before = {id(module): dict(module.__dict__) for module in model.modules()}
    config = copy.deepcopy(model.config)
    ids = torch.randint(1, 97, (2, 5), generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        expected = model(ids).logits
    stitch(model, config=EAGER_PIECES)
    assert unstitch(model) is model
    assert {id(m): set(m.__dict__) for m in model.modules()} == {
        key: set(attributes) for key, attributes in before.items()
    }
    assert model.config == config
    assert model.config._attn_implementation == "sdpa"
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected)
    assert model(ids).logits.requires_grad


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
        pair.stitched.model(**{"input_ids": pair.ids, **given})
    assert caught.value.where


def test_gradients_training_and_autocast_are_refused(pair: Pair) -> None:
    with pytest.raises(InputError, match="gradients are enabled"):
        pair.stitched(pair.ids)
    with torch.no_grad():
        with pytest.raises(InputError, match="empty"):
            pair.stitched(pair.ids[:, :0])
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(InputError, match="autocast"):
            pair.stitched(pair.ids)
        pair.stitched.train()
        try:
            with pytest.raises(InputError, match="training mode"):
                pair.stitched(pair.ids)
        finally:
            pair.stitched.eval()
    frozen = copy.deepcopy(pair.eager).requires_grad_(False)
    stitch(frozen, config=EAGER_PIECES)
    assert frozen(pair.ids).logits.shape == (2, 9, 97)


def test_two_threads_share_one_stitched_model(pair: Pair) -> None:
    generator = torch.Generator().manual_seed(9)
    prompts = [torch.randint(1, 97, (1 + n % 3, 4 + n), generator=generator) for n in range(6)]

    def answer(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
        return model.generate(ids, max_new_tokens=8, do_sample=False)

    with ThreadPoolExecutor(2) as pool:
        ours = list(pool.map(lambda ids: answer(pair.stitched, ids), prompts))
    for ids, got in zip(prompts, ours, strict=True):
        assert torch.equal(got, answer(pair.eager, ids))


def test_a_moved_model_is_noticed() -> None:
    model = stitch(build("llama"), config=EAGER_PIECES).to(torch.bfloat16)
    ids = torch.ones(1, 3, dtype=torch.long)
    with torch.no_grad(), pytest.raises(InputError, match="stitched as"):
        model(ids)
    stitch(unstitch(model), config=EAGER_PIECES)
    with torch.no_grad():
        assert model(ids).logits.dtype == torch.bfloat16


def test_saving_and_copying(pair: Pair, tmp_path: Path) -> None:
    pair.stitched.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded(pair.ids).logits, pair.eager(pair.ids).logits)
    assert set(pair.stitched.state_dict()) == set(pair.eager.state_dict())
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(UsageError, match="copied or pickled"):
            copied(pair.stitched)


def test_torch_s_switches_run_the_decoder_as_it_is():
    """Off, nothing is compiled; on again, it is; ``force_eager`` later runs the model's own forward, in the middle of a request too."""
    eager = build()
    ids = torch.randint(1, 97, (2, 9), generator=torch.Generator().manual_seed(5))
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        model = stitch(copy.deepcopy(eager), config=EAGER_PIECES)
        before = counters.num_graphs_seen
        assert torch.equal(model(ids).logits, eager(ids).logits)
        with pytest.raises(PieceworkError, match="force_eager"):
            _ = stitched_module(model).source
    assert counters.num_graphs_seen == before
    expected = eager.generate(ids, max_new_tokens=8, do_sample=False)
    with torch.no_grad():
        out = model(ids)
        assert stitched_module(model).source.code
        with torch.compiler.set_stance("force_eager"):
            grown = model(ids[:, :1], past_key_values=out.past_key_values)
            with torch.enable_grad():
                assert model(ids).logits.requires_grad  # as the model's own forward gives them
        again = model(ids[:, :1], past_key_values=grown.past_key_values)
        full = eager(torch.cat([ids, ids[:, :1], ids[:, :1]], dim=1))
        torch.testing.assert_close(again.logits[:, -1], full.logits[:, -1], rtol=1e-4, atol=1e-4)
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), expected)
    with torch.no_grad(), torch.compiler.set_stance("eager_on_recompile"):
        for each in (
            model,
            eager,
        ):  # the stitched forward refuses another weight; the flattened one runs as it is
            each.model.norm.weight = torch.nn.Parameter(torch.full((32,), 0.5))
        torch.testing.assert_close(model(ids).logits, eager(ids).logits, rtol=1e-4, atol=1e-4)
    with torch.no_grad(), torch._dynamo.config.patch(disable=True):
        embeds = model.get_input_embeddings()(ids)  # an entry that is not compiled yet
        torch.testing.assert_close(model(inputs_embeds=embeds).logits, eager(ids).logits)


def test_what_an_engine_says_of_the_batch_reaches_the_dispatcher() -> None:
    """A batch with adapters is not served from the graph without them, and what is dry stays dry."""
    model = stitch(build("llama"), config=EAGER_PIECES)
    entry = stitched_module(model)
    ids = torch.tensor([[5, 6, 7, 8]])
    entry.capture(
        [4], context_for=dry_request, pad=True, lora_counts=(1,), progress=False, estimate=False
    )
    with torch.no_grad():
        with set_forward_context(batch=BatchKind(has_lora=True, num_active_loras=1)):
            model(ids)
        model(ids)
    assert {row.graph: row.calls for row in entry.call_report()} == {
        "tokens=4": 1,
        "tokens=4 loras=1": 1,
    }
    kept = ForwardContext(batch=BatchKind(uniform_decode=True), dry=True, state={"mine": 1})
    with override_forward_context(kept), request_context("a request"):
        inner = get_forward_context()
        assert inner == replace(kept, state={"mine": 1, STATE_KEY: "a request"})
