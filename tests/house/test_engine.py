"""The example of an engine. In: random arrivals, cancels, too small a cache. Out: the tokens of one-by-one generation, captured sizes used, no block lost."""

from __future__ import annotations

import random
import textwrap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from processes import python

import piecework
from piecework.examples import engine as example
from piecework.examples.engine import BLOCK, Decoder, Engine, Limits, Paged, Request, Scheduler
from piecework.runtime import require_coverage, set_forward_context

LIMITS = Limits(tokens=24, requests=6, length=128, blocks=41)
SIZES = [1, 2, 6, 16]  # 6: a decode batch of all requests has a graph of its own


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Batches this small wait for each other's threads most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def served() -> Engine:
    return Engine(Decoder(), LIMITS, SIZES, {"backend": "eager"})


@pytest.fixture(scope="module")
def plain(served: Engine) -> Engine:
    """The model as it is, neither stitched nor captured."""
    return Engine(served.model, LIMITS)


def alone(engine: Engine, prompt: list[int], length: int) -> list[int]:
    engine.scheduler.add(request := Request(list(prompt), length))
    while request not in engine.step():
        pass
    return request.tokens


def prompts(draw: random.Random, count: int, longest: int = 60) -> list[list[int]]:
    return [draw.choices(range(256), k=draw.randint(1, longest)) for _ in range(count)]


def modes(engine: Engine) -> Counter[str]:
    found: Counter[str] = Counter()
    for row in engine.forward.call_report():
        found[row.mode] += row.calls
    return found


def require_sound(scheduler: Scheduler) -> None:
    """Each block has one owner, and nobody has the first."""
    owned = [block for request in scheduler.running for block in request.blocks]
    assert sorted([*owned, *scheduler.free]) == list(range(1, scheduler.limits.blocks))
    assert not any(request.blocks or request.cached for request in scheduler.waiting)
    assert len(scheduler.running) <= scheduler.limits.requests
    for request in scheduler.running:
        assert request.cached <= len(request.blocks) * BLOCK


@pytest.mark.parametrize("blocks", [41, 10])
@pytest.mark.parametrize("seed", range(4))
def test_arrivals_cancels_and_preemption_change_no_token(
    served: Engine, plain: Engine, seed: int, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(seed)
    asked: Counter[str] = Counter()

    def dispatch(count: int, uniform_decode: bool) -> object:
        asked["FULL" if uniform_decode else "PIECEWISE" if count <= 16 else "NONE"] += 1
        return served.forward.dispatch(count, uniform_decode)

    monkeypatch.setattr(served, "dispatch", dispatch)
    served.scheduler = scheduler = Scheduler(Limits(24, 6, 128, blocks))
    prompt_of = {Request(list(p), len(p) + draw.randint(1, 40)): p for p in prompts(draw, 14)}
    coming, finished, cancelled, before = list(prompt_of), [], [], modes(served)
    while coming or scheduler.running or scheduler.waiting:
        for _ in range(draw.choice([0, 0, 0, 1, 3])):
            if coming:
                scheduler.add(coming.pop())
        alive = scheduler.running + scheduler.waiting
        if alive and draw.random() < 0.03:
            cancelled.append(draw.choice(alive))
            scheduler.remove(cancelled[-1])
        finished += served.step()
        require_sound(scheduler)
        assert asked.total() < 2000, "it goes on for ever"
    assert {*finished, *cancelled} == {*prompt_of} and len(finished) > 8
    assert (scheduler.preemptions > 0) == (blocks == 10)
    for request in finished:
        assert request.tokens == alone(plain, prompt_of[request], request.length)
    # Each step ran as what its size and kind promise: decode as one graph, up to the largest size in pieces.
    assert modes(served) - before == asked and asked["FULL"] > 4


def test_a_cancelled_request_gives_its_blocks_back() -> None:
    scheduler = Scheduler(LIMITS)
    first, second = Request([1], 3), Request([2] * 40, 50)
    scheduler.add(first)
    scheduler.add(second)
    assert scheduler.next_batch() == {first: 1, second: 23}
    scheduler.remove(second)  # in the middle of its prompt
    require_sound(scheduler)
    assert scheduler.running == [first] and second.blocks == []
    scheduler.add(second)
    scheduler.remove(second)  # before it began
    assert scheduler.waiting == [] and len(scheduler.free) == 39
    assert scheduler.next_batch() == {first: 1}


def test_what_was_generated_is_what_one_pass_over_all_tokens_says(served: Engine) -> None:
    """Neither pages nor steps are left: all tokens at once, in a cache that is one row."""
    served.scheduler = Scheduler(LIMITS)
    for prompt in prompts(random.Random(5), 3):
        tokens = alone(served, prompt, len(prompt) + 20)
        ids = torch.tensor(tokens[:-1])
        at = torch.arange(len(ids))
        cache = torch.zeros(4, 2, 128, example.KV_HEADS, example.HEAD_DIM)
        paged = Paged(cache, at, at, torch.zeros_like(at), torch.arange(8)[None])
        with torch.no_grad(), set_forward_context(paged):
            logits = served.model.head(served.model(ids, at))
        assert logits.argmax(-1)[len(prompt) - 1 :].tolist() == tokens[len(prompt) :]


def test_captured_sizes_are_used(served: Engine) -> None:
    require_coverage(served.forward.coverage(LIMITS.tokens))
    served.scheduler = Scheduler(LIMITS)
    how = {"mode": "FULL_AND_PIECEWISE", "pad": True, "put_back": False, "progress": False}
    served.forward.capture(SIZES, context_for=served.context, **how)
    for length in (5, 3, 1):  # 9 tokens in the first step; then two requests decode, then one
        served.scheduler.add(Request([7] * length, 6))
    with piecework.counters.expect(num_cudagraph_captured=0):
        while served.scheduler.waiting or served.scheduler.running:
            served.step()
    rows = {(r.mode, r.graph): (r.calls, r.padding) for r in served.forward.call_report()}
    assert rows == {
        ("PIECEWISE", "tokens=16"): (1, 7),
        ("FULL", "tokens=2 reqs=2 uniform"): (2, 0),
        ("FULL", "tokens=1 reqs=1 uniform"): (2, 0),
    }


def test_a_long_prompt_runs_in_chunks_beside_those_that_decode(served: Engine) -> None:
    served.scheduler = scheduler = Scheduler(LIMITS)
    short, long = Request([3, 4], 40), Request([5] * 60, 61)
    scheduler.add(short)
    served.step()
    scheduler.add(long)
    cached = []
    while served.step() == []:
        cached.append(long.cached)
    assert cached == [23, 46] and len(long.tokens) == 61 and len(short.tokens) == 6


@pytest.mark.parametrize(("tokens", "length"), [([], 4), ([1, 2], 2), ([1], 129), ([1] * 127, 200)])
def test_a_request_that_can_not_run_is_refused(tokens: list[int], length: int) -> None:
    with pytest.raises(ValueError, match="at most 128 tokens"):
        Scheduler(LIMITS).add(Request(tokens, length))
    with pytest.raises(ValueError, match="at most 32 tokens"):  # the cache is the limit
        Scheduler(Limits(blocks=3)).add(Request([1], 33))


def test_the_demonstration(capsys: pytest.CaptureFixture[str]) -> None:
    example.main("eager", sizes=(4, 16))
    printed = capsys.readouterr().out
    assert "preemptions" in printed and "tokens a second" in printed
    assert "finished, each with the tokens of one-by-one generation" in printed


# --- attention -------------------------------------------------------------------------------------


def case(heads: int, kv_heads: int, dim: int, dtype: torch.dtype, seed: int = 0):
    """Tokens of three requests at random places, each request's blocks scattered over the cache."""
    made = torch.Generator().manual_seed(seed)
    tables = torch.randperm(18, generator=made).view(3, 6) + 1
    owners = torch.tensor([0, 0, 1, 2, 2])
    positions = torch.tensor([0, BLOCK - 1, BLOCK, 40, 6 * BLOCK - 1])
    shape = (19 * BLOCK, kv_heads, dim)
    keys, values = (torch.randn(shape, generator=made).to(dtype) for _ in range(2))
    query = torch.randn(len(owners), heads, dim, generator=made).to(dtype)
    return query, keys, values, Paged(keys, positions, positions, owners, tables)


def by_loops(query, keys, values, paged) -> torch.Tensor:
    """The definition, in double precision: a token and a head at a time."""
    rows = []
    for number, position in enumerate(paged.positions.tolist()):
        table = paged.tables[paged.owners[number]].tolist()
        slots = [table[at // BLOCK] * BLOCK + at % BLOCK for at in range(position + 1)]
        for head in range(query.shape[1]):
            group = head * keys.shape[1] // query.shape[1]
            k, v = keys[slots, group].double(), values[slots, group].double()
            scores = k @ query[number, head].double() / query.shape[2] ** 0.5
            rows.append(scores.softmax(0) @ v)
    return torch.stack(rows).view(query.shape).to(query.dtype)


SHAPES = [(4, 2, 16), (2, 2, 8), (3, 1, 24), (1, 1, 80), (2, 1, 64), (1, 1, 1)]


@pytest.mark.parametrize("shape", SHAPES)
def test_attention_in_torch_is_what_the_definition_says(shape: tuple[int, int, int]) -> None:
    query, keys, values, paged = case(*shape, torch.float32)
    example.attend_in_torch(query, keys, values, paged, out := torch.empty_like(query))
    torch.testing.assert_close(out, by_loops(query, keys, values, paged))


INTERPRETED = """
    import random, sys, torch
    sys.path[:0] = {folders!r}
    from piecework.examples import engine as example
    from test_engine import LIMITS, SHAPES, Decoder, Engine, alone, by_loops, case, prompts

    torch.set_num_threads(1)
    for seed, shape in enumerate(SHAPES):
        for dtype in (torch.float32, torch.float16, torch.bfloat16)[: 1 + 2 * (seed % 2)]:
            query, keys, values, paged = case(*shape, dtype, seed)
            example.attend_in_triton(query, keys, values, paged, out := torch.full_like(query, 7))
            torch.testing.assert_close(out, by_loops(query, keys, values, paged))
    plain, chosen = Engine(Decoder(layers=1), LIMITS), prompts(random.Random(1), 2, 20)
    in_torch = [alone(plain, prompt, len(prompt) + 4) for prompt in chosen]
    example.attend_in_torch = example.attend_in_triton
    assert [alone(plain, prompt, len(prompt) + 4) for prompt in chosen] == in_torch
    print("equal")
"""


def test_attention_in_triton_is_what_the_definition_says_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "shared")]
    text = textwrap.dedent(INTERPRETED.format(folders=folders))
    assert python("-c", text, TRITON_INTERPRET="1").stdout == "equal\n"
