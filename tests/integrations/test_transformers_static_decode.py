"""Decode steps of static caches in full graphs: whatever becomes of a cache between two of them, and whoever else holds one, the tokens are the model's own."""

from __future__ import annotations

import copy
import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from fake_cuda import FakeCuda
from models import EAGER
from small_llms import DEEPSEEK, GEMMA
from small_llms import build as built

import piecework
from piecework.errors import ConfigError, InputError, StaticGraphError
from piecework.integrations.transformers import (
    how_served,
    sleep,
    stitch,
    stitched_module,
    unstitch,
    wake_up,
)
from piecework.integrations.transformers.request import static_decode
from piecework.integrations.transformers.request.static_decode import StaticStep
from piecework.runtime import CUDAGraphMode, set_forward_context
from piecework.runtime.graphs import BatchDescriptor, BatchKind
from piecework.runtime.graphs.memory import owner

transformers = pytest.importorskip("transformers")

IDS = torch.randint(1, 97, (4, 6), generator=torch.Generator().manual_seed(5))
LENGTH = 32
GREEDY = {"max_new_tokens": 7, "do_sample": False, "cache_implementation": "static"}
Models = tuple[torch.nn.Module, torch.nn.Module]


def both(family: str = "llama", **fields: object) -> Models:
    """A model, and the same one stitched with its decode steps captured."""
    eager = built(family, max_position_embeddings=128, **fields).requires_grad_(False)
    how = {"config": EAGER, "capture": [1, 2, 4], "max_cache_len": LENGTH}
    return eager, stitch(copy.deepcopy(eager), **how)


@pytest.fixture(scope="module")
def llama() -> Models:
    return both()


@pytest.fixture
def models(llama: Models) -> Models:
    """Llama, with nothing in the memory of its graphs and nothing counted."""
    gc.collect()
    stitched_module(llama[1]).static_graphs.count_anew()
    llama[1].model.forward.way.static.outside.clear()
    return llama


def full_steps(model: torch.nn.Module) -> int:
    return sum(row.calls for row in stitched_module(model).call_report() if row.mode == "FULL")


def static(model: torch.nn.Module, length: int = 24) -> transformers.StaticCache:
    return transformers.StaticCache(config=model.config, max_cache_len=length)


class Request:
    """A request in both models, a static cache each."""

    def __init__(
        self, models: Models, ids: torch.Tensor = IDS[:3], length: int = 24, **given: object
    ) -> None:
        self.eager, self.ours = models
        self.theirs, self.mine = static(self.eager, length), static(self.ours, length)
        self.prompt(ids, **given)

    def prompt(self, ids: torch.Tensor, **given: object) -> None:
        expected = self.eager(ids, past_key_values=self.theirs, **given).logits
        got = self.ours(ids, past_key_values=self.mine, **given).logits
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        self.next = expected[:, -1:].argmax(-1)

    def steps(self, count: int = 2, **given: object) -> None:
        for _ in range(count):
            self.prompt(self.next, **given)
        for mine, other in zip(self.mine.layers, self.theirs.layers, strict=True):
            torch.testing.assert_close(mine.keys, other.keys)
            torch.testing.assert_close(mine.values, other.values)
            assert int(mine.cumulative_length) == int(other.cumulative_length)


@pytest.mark.sample(3)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt_neox", "deepseek_v3", "mixtral"])
def test_generate_from_full_graphs(family: str) -> None:
    eager, ours = both(family, **(DEEPSEEK if family == "deepseek_v3" else {}))
    for batch in (1, 3, 2, 4):  # three is padded to four
        expected = eager.generate(IDS[:batch], **GREEDY)
        assert torch.equal(ours.generate(IDS[:batch], **GREEDY), expected)
    assert full_steps(ours) == 4 * 6
    assert not how_served(ours).outside


def test_left_padding_and_masks_of_the_callers(models: Models) -> None:
    padded = torch.ones(3, 6, dtype=torch.long)
    padded[0, :4] = padded[2, :1] = 0
    expected, got = (m.generate(IDS[:3], attention_mask=padded, **GREEDY) for m in models)
    assert torch.equal(got, expected)
    request = Request(models)
    mask = torch.zeros(3, 1, 1, 24)
    mask[:, :, :, 7:] = -torch.inf
    mask[1, :, :, 2] = -torch.inf
    request.steps(1, attention_mask=mask)
    assert full_steps(models[1]) == 6 + 1


def test_one_cache_at_a_time_is_in_the_graphs(models: Models) -> None:
    first, second = Request(models), Request(models, IDS[2:4])
    first.steps(1)
    second.steps(2)  # outside: the first one's tensors are there
    first.steps(2)
    outside = how_served(models[1]).outside
    assert outside == {"another cache lies in the memory of the graphs": 2}
    assert "outside full graphs, 2 steps" in str(how_served(models[1]))
    del first
    gc.collect()
    before = full_steps(models[1])
    second.steps(2)
    assert full_steps(models[1]) == before + 2


def test_threads_take_turns_in_the_graphs(models: Models) -> None:
    """One of them is in the graphs' memory, the other beside it; who is first is not said."""
    prompts = [IDS[first : first + 1 + first % 3] for first in (0, 1, 2, 0, 1, 2)]
    with ThreadPoolExecutor(2) as pool:
        got = list(pool.map(lambda ids: models[1].generate(ids, **GREEDY), prompts))
    for ids, tokens in zip(prompts, got, strict=True):
        assert torch.equal(tokens, models[0].generate(ids, **GREEDY))
    assert full_steps(models[1]) >= 6


def test_capturing_again_over_a_full_cache_stores_nothing_behind_its_end() -> None:
    models = both()
    request = Request(models, length=LENGTH)
    request.steps(LENGTH - IDS.shape[1])
    entry, static = stitched_module(models[1]), models[1].model.forward.way.static
    told = {"context_for": static.context_for, "runtime": {"max_num_seqs": 4}}
    entry.capture([2, 4], mode="FULL_DECODE_ONLY", progress=False, **told)
    request.steps(0)
    with pytest.raises(InputError, match="the static cache is full"):
        models[1](request.next, past_key_values=request.mine)


@torch.no_grad()
def test_masks_and_caches_are_copied_after_the_step_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps on several streams: the copies for one come before its call, and must wait too."""
    eager = built("llama", max_position_embeddings=128).requires_grad_(False)
    ours = stitch(copy.deepcopy(eager), config=EAGER)
    ours(IDS[:2])  # traces
    cuda = FakeCuda("2.13")
    cuda.install(monkeypatch)
    monkeypatch.setattr(static_decode, "platform_for", owner.platform_for)
    static = ours.model.forward.way.static_decode(2, LENGTH)
    told = {"context_for": static.context_for, "runtime": {"max_num_seqs": 2}}
    entry = stitched_module(ours)
    entry.capture([2], mode="FULL_DECODE_ONLY", progress=False, estimate=False, **told)
    static.step._own = (
        static.step._users()
    )  # a fake of a graph holds the tensors that it replays on
    writes = []

    def ordered(write):
        def run(*given):
            cuda.require_ordered()  # what it writes is read by every replay so far
            writes.append(write)
            return write(*given)

        return run

    for name in ("put_masks", "move_in"):
        monkeypatch.setattr(StaticStep, name, ordered(getattr(StaticStep, name)))
    for ids in (IDS[:2], IDS[2:]):
        request = Request((eager, ours), ids)
        for stream in cuda.streams:
            with cuda.on(stream):
                request.steps(1)
        del request
        gc.collect()
    assert full_steps(ours) == 8 and len(writes) == 8 + 2


def test_what_somebody_holds_of_a_dead_cache_stays(models: Models) -> None:
    request = Request(models)
    request.steps(1)
    held = request.mine.layers[1].keys[:1]
    kept = held.clone()
    del request
    gc.collect()
    other = Request(models, IDS[1:4])
    other.steps(3)
    assert torch.equal(held, kept)
    assert how_served(models[1]).outside
    del held
    before = full_steps(models[1])
    other.steps(1)
    assert full_steps(models[1]) == before + 1


def test_whatever_becomes_of_a_cache(models: Models) -> None:
    """Chunks of several tokens, a reset and another prompt, other rows, one layer's tensors replaced."""
    request = Request(models, length=30)
    request.steps(2)
    request.prompt(IDS[:3, :4])
    request.steps(2)
    for cache in (request.mine, request.theirs):
        cache.reset()
    request.prompt(IDS[1:4])
    request.steps(2)
    for cache in (request.mine, request.theirs):
        cache.reorder_cache(torch.tensor([2, 0, 0]))
    request.steps(2)
    for cache in (request.mine, request.theirs):
        cache.layers[0].values = cache.layers[0].values * 2
    request.steps(2)
    assert full_steps(request.ours) >= 6


def test_a_full_cache_is_an_error_and_stays_as_it_is(models: Models) -> None:
    request = Request(models, length=8)  # in memory with room for more
    request.steps(2)
    before = [layer.keys.clone() for layer in request.mine.layers]
    with pytest.raises(InputError, match="room for 8 tokens"):
        models[1](request.next, past_key_values=request.mine)
    for layer, kept in zip(request.mine.layers, before, strict=True):
        assert torch.equal(layer.keys, kept)


def test_inference_mode_before_and_after(models: Models) -> None:
    with torch.inference_mode():
        request = Request(models)
        request.steps(1)
    copied = Request(models)
    copied.steps(1)
    with torch.inference_mode():
        copied.steps(1)
    copied.steps(1)


def test_sleep_and_wake_up_while_a_cache_lies_there(models: Models) -> None:
    request = Request(models)
    request.steps(1)
    sleep(models[1])
    request.steps(1)
    wake_up(models[1])
    request.steps(1)
    assert full_steps(models[1]) == 1  # counted anew
    del request
    gc.collect()
    sleep(models[1])
    assert models[1].model.forward.way.static.step is None
    Request(models).steps(1)
    wake_up(models[1])
    Request(models).steps(1)
    assert full_steps(models[1]) == 1


def test_an_engine_cannot_send_another_cache_into_a_full_graph(models: Models) -> None:
    eager, ours = models
    mine, theirs = transformers.DynamicCache(), transformers.DynamicCache()
    ours(IDS[:2], past_key_values=mine)
    eager(IDS[:2], past_key_values=theirs)
    token = IDS[:2, :1]
    with set_forward_context(batch=BatchKind(uniform_decode=True)):
        got = ours(token, past_key_values=mine).logits
    torch.testing.assert_close(got, eager(token, past_key_values=theirs).logits)
    assert full_steps(ours) == 0
    chosen = BatchDescriptor(2, num_reqs=2, uniform=True)
    with (
        set_forward_context(cudagraph_runtime_mode=CUDAGraphMode.FULL, batch_descriptor=chosen),
        pytest.raises(InputError, match="does not lie in its memory"),
    ):
        ours(token, past_key_values=mine)


def test_only_decode_steps_are_captured_in_decode_only() -> None:
    eager = built(max_position_embeddings=128).requires_grad_(False)
    config = {"backend": "eager", "cudagraph_mode": "FULL_DECODE_ONLY"}
    how = {"capture": [1, 2, 8], "max_cache_len": 16, "max_num_seqs": 2}
    ours = stitch(copy.deepcopy(eager), config=config, **how)
    modes = {(row.mode.name, row.first, row.last) for row in stitched_module(ours).coverage(8)}
    assert modes == {("FULL", 1, 1), ("FULL", 2, 2), ("NONE", 1, 8)}
    for batch in (2, 4):
        assert torch.equal(
            ours.generate(IDS[:batch], **GREEDY), eager.generate(IDS[:batch], **GREEDY)
        )
    assert full_steps(ours) == 6
    assert how_served(ours).outside == {"4 sequences, and graphs for at most 2": 6}


@pytest.mark.parametrize(
    "family, fields, why",
    [
        ("gemma3_text", GEMMA, "StaticSlidingWindowLayer"),
        ("llama", {"attn_implementation": "eager"}, "only 'sdpa' is captured"),
        ("bloom", {}, "not captured"),
    ],
)
def test_models_whose_steps_are_not_captured(
    family: str, fields: dict[str, object], why: str
) -> None:
    model = built(family, **fields).requires_grad_(False)
    with pytest.raises(StaticGraphError, match=why):
        stitch(model, config=EAGER, capture=[1], max_cache_len=16)
    stitch(model, config=EAGER)  # it was left as it was


@pytest.mark.parametrize(
    "given, why",
    [
        ({"max_cache_len": 16}, "sizes in capture"),
        ({"max_cache_len": 0, "capture": [1]}, "positive numbers"),
        ({"max_cache_len": 16, "max_num_seqs": -1, "capture": [1]}, "positive numbers"),
        ({"max_num_seqs": 2, "capture": [1]}, "up to max_cache_len tokens"),
        ({"capture": [1], "config": {"cudagraph_mode": "FULL"}}, "up to max_cache_len tokens"),
        (
            {"capture": [1], "max_cache_len": 16, "config": {"cudagraph_mode": "PIECEWISE"}},
            "no cudagraph_mode of PIECEWISE",
        ),
    ],
)
def test_settings_that_say_nothing(given: dict[str, object], why: str) -> None:
    model = built().requires_grad_(False)
    config = {"backend": "eager", **given.pop("config", {})}  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match=why):
        stitch(model, config=config, **given)
    with pytest.raises(piecework.errors.UsageError):
        unstitch(model)
