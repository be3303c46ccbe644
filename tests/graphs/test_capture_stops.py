"""Stops, failures and budgets of ``capture``, at the level of a Llama; and replay source that does not depend on the process."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from models import EAGER

import piecework
from piecework.errors import BindError, EmitError
from piecework.runtime.batch.forward_context import get_forward_context, set_forward_context
from piecework.runtime.graphs import BatchKind, CUDAGraphMode, FailurePolicy
from piecework.runtime.graphs.serve import model as captured
from piecework.runtime.graphs.serve import replay as captured_replay

SIZES = [1, 2, 4, 8]
FULL, PIECEWISE = CUDAGraphMode.FULL, CUDAGraphMode.PIECEWISE


# --- a Llama of transformers -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama():
    transformers = pytest.importorskip("transformers")
    from piecework.integrations.transformers import stitch

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    prompts = [torch.randint(0, 64, (1, n)) for n in (1, 2, 3, 5, 8, 9)]
    with torch.no_grad():
        expected = [model(prompt).logits for prompt in prompts]
    stitch(model, config=EAGER)
    return model, prompts, expected


def capture(llama, sizes=SIZES, **options):
    from piecework.integrations.transformers import stitched_module
    from piecework.integrations.transformers.request.dry import dry_request

    stitched = stitched_module(llama[0])
    wish = {
        "progress": False,
        "estimate": False,
        "poison": True,
        "context_for": dry_request,
        "pad": True,
    }
    return stitched.capture(sizes, **{**wish, **options})


def require_right(llama) -> None:
    """Every prompt gives the logits of the model before it was stitched."""
    model, prompts, expected = llama
    with torch.no_grad():
        for prompt, right in zip(prompts, expected, strict=True):
            torch.testing.assert_close(model(prompt).logits, right, rtol=1e-4, atol=1e-4)


def sizes_of(stitched) -> list[int]:
    return sorted(descriptor.num_tokens for _, descriptor in stitched.static_graphs.replays)


class StopAfter:
    """A watcher that interrupts like Ctrl-C."""

    def __init__(self, count: int) -> None:
        self.left = count

    def started(self, total: int) -> None: ...

    def finished(self, outcome, held_bytes: int) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt

    def ended(self) -> None: ...


def capture_of(llama):
    from piecework.integrations.transformers import stitched_module

    return stitched_module(llama[0])


def test_an_interrupt_while_replays_are_proved_leaves_the_rest_uncaptured(
    llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = captured_replay.generate_replay, []

    def stops(source, split_gm, facts):
        seen.append(facts.tokens)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return real(source, split_gm, facts)

    monkeypatch.setattr(captured_replay, "generate_replay", stops)
    with pytest.raises(KeyboardInterrupt):
        capture(llama)
    stitched = capture_of(llama)
    assert seen == [8, 4, 2] and sizes_of(stitched) == [4, 8]
    modes = {(row.first, row.last): row.descriptor for row in stitched.coverage(8)}
    assert {each.num_tokens for each in modes.values() if each is not None} == {4, 8}
    held = {descriptor.num_tokens for _, descriptor in stitched.memory_report().held}
    assert held == {4, 8}
    require_right(llama)


@pytest.mark.parametrize("policy", list(FailurePolicy))
def test_a_replay_that_does_not_prove_is_not_served(
    llama, policy: FailurePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = captured_replay.generate_replay

    def fails(source, split_gm, facts):
        if facts.tokens == 4:
            raise EmitError("no proof", where="tokens=4")
        return real(source, split_gm, facts)

    monkeypatch.setattr(captured_replay, "generate_replay", fails)
    if policy is FailurePolicy.RAISE:
        with pytest.raises(EmitError, match="no proof"):
            capture(llama, on_failure=policy)
        assert sizes_of(capture_of(llama)) == [8]
    else:
        capture(llama, on_failure=policy)
        assert sizes_of(capture_of(llama)) == [1, 2, 8]
        [(key, error)] = capture_of(llama).static_graphs.failures.items()
        assert key[1].num_tokens == 4 and "no proof" in str(error)
    require_right(llama)


def test_a_budget_chooses_sizes_and_memory_stays_in_it(llama) -> None:
    stitched = capture(llama, estimate=True)
    whole = stitched.memory_report()
    assert whole.estimate is not None
    assert whole.estimate.total == pytest.approx(whole.total, rel=0.1)
    for share in (0.9, 0.6):
        budget = int(whole.total * share)
        stitched = capture(llama, memory_budget=budget)
        report = stitched.memory_report()
        assert 0 < report.total <= budget
        dropped = {descriptor.num_tokens for _, descriptor in report.dropped}
        assert dropped and dropped.isdisjoint(sizes_of(stitched))
        assert sorted(dropped | set(sizes_of(stitched))) == SIZES
        reasons = {row.reason.name for row in stitched.coverage(8)}
        assert reasons <= {"EXACT", "PADDED", "NOT_CAPTURED"}
        require_right(llama)
    stitched = capture(llama, memory_budget=1)
    assert sizes_of(stitched) == [] and stitched.memory_report().total == 0
    require_right(llama)


# --- failures that name piece and descriptor --------------------------------------------------------


@piecework.splitting_op("capture_stops::fresh", rows="independent")
def fresh(x: torch.Tensor) -> torch.Tensor:
    if get_forward_context().attn_metadata == "stop":
        raise KeyboardInterrupt
    return x * 3


@fresh.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def small():
    weights = [torch.randn(4, 4) for _ in range(2)]
    example = torch.randn(5, 4)
    torch._dynamo.decorators.mark_unbacked(example, 0)

    def model(x):
        return torch.tanh(fresh(x @ weights[0])) @ weights[1]

    return model, piecework.compile(model, (example,), config=EAGER)


def stops_at(mode: CUDAGraphMode, tokens: int, run: int = 1):
    """A context factory whose op interrupts when ``tokens`` is captured for the ``run``-th time in ``mode``."""
    runs = [0]

    def context_for(asked, descriptor):
        now = asked is mode and descriptor.num_tokens == tokens
        runs[0] += now
        metadata = "stop" if now and runs[0] == run else None
        return set_forward_context(
            metadata, cudagraph_runtime_mode=asked, batch_descriptor=descriptor
        )

    return context_for


def served(stitched, model) -> None:
    for kind in (None, BatchKind(uniform_decode=True)):
        for n in range(1, 6):
            x = torch.randn(n, 4)
            with set_forward_context(batch=kind):
                torch.testing.assert_close(stitched(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("mode", "left"), [(PIECEWISE, {4}), (FULL, {1, 2, 4})])
def test_ctrl_c_between_two_pieces_forgets_the_descriptor_in_progress(mode, left) -> None:
    model, stitched = small()
    with pytest.raises(KeyboardInterrupt):
        stitched.capture(
            [1, 2, 4],
            mode="FULL_AND_PIECEWISE",
            context_for=stops_at(mode, 2),
            progress=False,
            estimate=False,
            poison=True,
        )
    keys = set(stitched.static_graphs.replays)
    assert {descriptor.num_tokens for found, descriptor in keys if found is PIECEWISE} == left
    assert {d.num_tokens for found, d in keys if found is FULL} == ({4} if mode is FULL else set())
    records = {(record.mode, record.descriptor) for record in stitched.static_graphs.graphs.records}
    assert records == keys
    served(stitched, model)
    stitched.capture([1, 2, 4], mode="FULL", progress=False, estimate=False)
    served(stitched, model)


def test_ctrl_c_in_the_estimate_leaves_the_model_as_it_was() -> None:
    model, stitched = small()
    with pytest.raises(KeyboardInterrupt):
        stitched.capture([1, 2, 4], context_for=stops_at(PIECEWISE, 2), progress=False)
    with pytest.raises(BindError, match="nothing is captured"):
        stitched.memory_report()
    served(stitched, model)


def test_ctrl_c_may_return_instead_of_raising() -> None:
    model, stitched = small()
    stitched.capture(
        [1, 2, 4],
        context_for=stops_at(PIECEWISE, 1),
        raise_interrupt=False,
        progress=False,
        estimate=False,
    )
    report = stitched.static_graphs.report
    assert report.interrupted and [key[1].num_tokens for key in report.skipped] == [1]
    assert sizes_of(stitched) == [2, 4]
    served(stitched, model)


# --- the same text in every process ----------------------------------------------------------------

PROGRAM = """
import sys
sys.path.insert(0, {folder!r})
from test_capture_modes import compiled
_, stitched = compiled()
stitched.capture([2, 8], mode="FULL_AND_PIECEWISE", lora_counts=(1, 3), axes={{"b": (1, 2), "a": (3,)}},
                 progress=False, estimate=False)
for (mode, key), replay in stitched.static_graphs.replays.items():
    print(mode.name, key.describe())
    print(replay.source.code)
    print(sorted((name, repr(what)) for name, what in replay.source.held.items()))
for row in stitched.coverage(9):
    print(row.kind, row.first, row.last, row.mode.name, row.descriptor)
"""


def test_what_turns_out_too_expensive_is_given_up_while_capturing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The estimate was far too low, as on a GPU that somebody else uses meanwhile."""
    real = captured.estimate_memory

    def far_too_low(*args, **kwargs):
        found = real(*args, **kwargs)
        models = {
            kind: replace(model, per_token=0.0, fixed=0.0) for kind, model in found.models.items()
        }
        return replace(found, models=models)

    monkeypatch.setattr(captured, "estimate_memory", far_too_low)
    model, stitched = small()
    stitched.capture([1, 2, 4], memory_budget=100, progress=False)
    assert sizes_of(stitched) == [4]  # the first tells what captures really take
    assert {key[1].num_tokens for key in stitched.memory_report().dropped} == {1, 2}
    served(stitched, model)
