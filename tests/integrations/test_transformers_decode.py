"""Decode steps, whose keys and values are written in place: whatever is done to a cache between two of them, the tokens are the model's own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from small_llms import GEMMA, Pair
from small_llms import build as built

from piecework.errors import InputError
from piecework.runtime import torch_compat

transformers = pytest.importorskip("transformers")

Cache = transformers.Cache
IDS = torch.randint(1, 97, (3, 6), generator=torch.Generator().manual_seed(5))


def build(family: str = "llama") -> torch.nn.Module:
    fields = {**(GEMMA if family == "gemma3_text" else {}), "max_position_embeddings": 256}
    return built(family, **fields).requires_grad_(False)


class Caches:
    """A request twice, a cache each."""

    def __init__(self, pair: Pair, make: Callable[[], Cache], ids: torch.Tensor = IDS) -> None:
        self.pair, self.ours, self.theirs, self.next = pair, make(), make(), ids
        self.steps(1)
        self.next = ids[:, -1:]

    def both(self, change: Callable[[Cache], object]) -> None:
        change(self.ours)
        change(self.theirs)

    def steps(self, count: int = 2, **given: object) -> None:
        """Decode greedily, and compare the logits of each step and what the caches hold."""
        for _ in range(count):
            given["past_key_values"] = self.ours, self.theirs
            _, want = self.pair.call(self.next, **given)
            self.next = want.logits.argmax(-1)


@pytest.fixture(scope="module")
def pair() -> Pair:
    return Pair(build())


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def replaced(cache: Cache) -> None:
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.flip(0), layer.values.clone()


def selected_and_repeated(cache: Cache) -> None:
    cache.batch_select_indices(torch.tensor([1]))
    cache.batch_repeat_interleave(3)


def values_alone(cache: Cache) -> None:
    cache.layers[1].values = cache.layers[1].values * 2


CHANGES = {
    "cropped": lambda cache: cache.crop(-3),
    "reordered": lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])),
    "selected and repeated": selected_and_repeated,
    "scaled in place": lambda cache: [layer.keys.mul_(0.5) for layer in cache.layers],
    **{"replaced": replaced, "values alone": values_alone},
    "other layers": lambda cache: setattr(cache, "layers", copy.deepcopy(cache.layers)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_cache_that_was_changed_between_two_steps(
    pair: Pair, change: Callable[[Cache], None]
) -> None:
    caches = Caches(pair, transformers.DynamicCache)
    caches.steps()
    for count in (2, 1):
        caches.both(change)
        caches.steps(count)


def test_a_cache_grows_past_the_room_of_its_buffers(pair: Pair) -> None:
    Caches(pair, transformers.DynamicCache).steps(140)


def test_whoever_holds_earlier_keys_keeps_what_they_saw(pair: Pair) -> None:
    caches = Caches(pair, transformers.DynamicCache)
    caches.steps()
    layer = caches.ours.layers[0]
    held, before = layer.keys, layer.keys.clone()
    caches.steps()
    caches.both(CHANGES["cropped"])
    caches.steps()
    assert torch.equal(held, before)
    assert (
        held.untyped_storage().nbytes() > held.nbytes
    )  # in a buffer with room, or this shows nothing


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_branches_of_one_cache_don_t_meet(pair: Pair, copied: Callable[[object], object]) -> None:
    caches = Caches(pair, transformers.DynamicCache)
    caches.steps()
    branch = transformers.DynamicCache()
    branch.layers = [copied(layer) for layer in caches.ours.layers]
    other = copy.deepcopy(caches.theirs)
    first, second = caches.next, (caches.next + 7) % 97
    for _ in range(2):
        for ids, mine, theirs in ((first, caches.ours, caches.theirs), (second, branch, other)):
            pair.call(ids, past_key_values=(mine, theirs))


def test_caches_go_in_and_out_of_inference_mode(pair: Pair) -> None:
    caches = Caches(pair, transformers.DynamicCache)
    with torch.inference_mode():
        caches.steps()
    caches.steps()
    with torch.inference_mode():
        inside = Caches(pair, transformers.DynamicCache)
        inside.steps()
    inside.steps()


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_step_asks_no_guard_tree_and_sees_what_a_configuration_has_now(
    monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    pair, asked = Pair(build(family)), []
    caches = Caches(pair, transformers.DynamicCache)
    caches.steps()
    with monkeypatch.context() as patched:
        patched.setattr(torch_compat, "failing_guard", lambda *a: asked.append(a) or "")
        caches.steps()
    assert not asked
    pair.stitched.config.is_causal = False  # its class looks names up in a way of its own
    with pytest.raises(InputError, match="is_causal"):
        caches.steps(1)


def test_a_cache_of_the_user_s_own_is_asked(pair: Pair) -> None:
    class Counting(transformers.DynamicCache):
        updates = 0

        def update(self, *args: object, **kwargs: object) -> tuple[torch.Tensor, torch.Tensor]:
            self.updates += 1
            return super().update(*args, **kwargs)

    caches = Caches(pair, Counting)
    caches.steps(3)
    assert caches.ours.updates == caches.theirs.updates == 8


def test_a_static_cache_is_written_where_it_says(pair: Pair) -> None:
    def make() -> Cache:
        return transformers.StaticCache(config=pair.eager.config, max_cache_len=12)

    caches = Caches(pair, make)
    places = [layer.keys.data_ptr() for layer in caches.ours.layers]
    caches.steps(3)
    caches.both(lambda cache: [layer.cumulative_length.sub_(2) for layer in cache.layers])
    caches.steps(3)
    assert [layer.keys.data_ptr() for layer in caches.ours.layers] == places
    caches.steps(2)
    for model, cache in ((pair.eager, caches.theirs), (pair.stitched, caches.ours)):
        with pytest.raises((IndexError, RuntimeError), match=r"index .*out of|out of range"):
            model(caches.next, past_key_values=cache)


def test_masks_of_every_form_hold_for_one_token(pair: Pair) -> None:
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[0, :4] = 0
    each_head = torch.zeros(3, 4, 1, 9).masked_fill_(torch.rand(3, 4, 1, 9) < 0.3, -torch.inf)
    each_head[..., -1] = 0
    caches = Caches(pair, transformers.DynamicCache)
    caches.steps(1, attention_mask=mask)
    caches.steps(1, attention_mask=torch.ones(3, 8, dtype=torch.long))
    caches.steps(1, attention_mask=each_head)
    caches.steps(1, attention_mask=(torch.rand(3, 1, 1, 10) < 0.7) | (torch.arange(10) > 8))


@pytest.mark.parametrize("length", [1, 3, 6])
def test_a_mask_of_ones_hides_what_lies_behind_its_end(pair: Pair, length: int) -> None:
    Caches(pair, transformers.DynamicCache).steps(
        1, attention_mask=torch.ones(3, length, dtype=torch.long)
    )
