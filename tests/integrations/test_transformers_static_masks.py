"""Masks of decode steps over static caches: those that transformers makes, whatever a caller says of the tokens."""

from __future__ import annotations

import itertools

import pytest
import torch

from piecework.integrations.transformers.request.step import StaticMasks

transformers = pytest.importorskip("transformers")

CONFIG = transformers.LlamaConfig(
    num_hidden_layers=2, num_attention_heads=2, hidden_size=8, attn_implementation="sdpa"
)
BATCH = 3


def cache_of(length: int, past: int, config: object = CONFIG) -> transformers.StaticCache:
    cache = transformers.StaticCache(config=config, max_cache_len=length)
    rows = torch.randn(BATCH, 2, past, 4)
    for index in range(2):
        cache.update(rows, rows, index)
    return cache


def own_mask(cache: object, attention_mask: object) -> torch.Tensor:
    from transformers.masking_utils import create_causal_mask

    given = {"attention_mask": attention_mask, "past_key_values": cache}
    return create_causal_mask(config=CONFIG, inputs_embeds=torch.empty(BATCH, 1, 0), **given)


def never() -> torch.Tensor:
    raise AssertionError("it was made by transformers")


def padded(tokens: int) -> torch.Tensor:
    mask = torch.ones(BATCH, tokens, dtype=torch.long)
    mask[0, : tokens - 1] = mask[1, :1] = 0
    return mask


# What a caller may say of so many tokens.
FORMS = {
    "nothing": lambda tokens: None,
    "ones": lambda tokens: torch.ones(BATCH, tokens, dtype=torch.long),
    "left padding": padded,
    "holes": lambda tokens: torch.arange(BATCH * tokens).view(BATCH, tokens) % 3 % 2,
    "floats": lambda tokens: torch.full((BATCH, tokens), 0.5),
    "one sequence hidden": lambda tokens: torch.tensor([[1], [1], [0]]).repeat(1, tokens),
}


@pytest.mark.parametrize("form", FORMS)
def test_as_transformers_makes_them(form: str) -> None:
    masks = StaticMasks()
    first = cache_of(7, 2)
    asked = FORMS[form](3)
    masks.mask(first, asked, BATCH, "kind", lambda: own_mask(first, asked))
    for length, past in itertools.product((5, 9, 12), (1, 3, 4)):
        cache = cache_of(length, past)
        for told in {1, past, past + 1, min(past + 3, length)}:  # too short and longer ones too
            asked = FORMS[form](told)
            got = masks.mask(cache, asked, BATCH, "kind", never)
            assert torch.equal(got, own_mask(cache, asked)), (length, past, told)


def test_where_they_differ_transformers_own_is_taken() -> None:
    masks, cache = StaticMasks(), cache_of(6, 2)
    other = torch.zeros(BATCH, 1, 1, 6, dtype=torch.bool)
    for _ in range(3):
        assert masks.mask(cache, None, BATCH, "kind", lambda: other) is other
    mine = masks.mask(cache, None, BATCH, "another", lambda: own_mask(cache, None))
    assert torch.equal(mine, own_mask(cache, None))
    assert torch.equal(masks.mask(cache, None, BATCH, "another", never), mine)


@pytest.mark.parametrize("case", ["growing", "empty", "windows", "4D", "longer", "other rows"])
def test_what_is_of_another_form_is_left_to_transformers(case: str) -> None:
    def static(config: object = CONFIG) -> transformers.StaticCache:
        return transformers.StaticCache(config=config, max_cache_len=6)

    windows = transformers.MistralConfig(
        num_hidden_layers=2, num_attention_heads=2, hidden_size=8, sliding_window=3
    )
    caches = {"growing": transformers.DynamicCache(), "empty": static(), "windows": static(windows)}
    asked = {"4D": torch.zeros(BATCH, 1, 1, 6), "longer": torch.ones(BATCH, 7)}
    asked["other rows"] = torch.ones(1, 3)
    masks, mark = StaticMasks(), object()
    given = (caches.get(case, cache_of(6, 2)), asked.get(case), BATCH, "kind", lambda: mark)
    assert masks.mask(*given) is mark
    masks.mask(cache_of(6, 2), None, BATCH, "kind", lambda: own_mask(cache_of(6, 2), None))
    assert masks.mask(*given) is mark
