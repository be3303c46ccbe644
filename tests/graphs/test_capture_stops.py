"""Stops, failures and budgets of ``capture``: what was captured before serves, the rest runs uncaptured."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from captured import sizes_of
from models import EAGER

import piecework
from piecework.errors import BindError, EmitError
from piecework.runtime.batch.forward_context import get_forward_context, set_forward_context
from piecework.runtime.graphs import BatchKind, CUDAGraphMode, FailurePolicy
from piecework.runtime.graphs.plan import phase
from piecework.runtime.graphs.serve import replay as captured_replay

SIZES = [1, 2, 4, 8]
FULL, PIECEWISE = CUDAGraphMode.FULL, CUDAGraphMode.PIECEWISE


@piecework.splitting_op("capture_stops::fresh", rows="independent")
def fresh(x: torch.Tensor) -> torch.Tensor:
    if get_forward_context().attn_metadata == "stop":
        raise KeyboardInterrupt
    return x * 3


fresh.register_fake(torch.empty_like)


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


@pytest.mark.parametrize(
    ("error", "policy", "left"),
    [
        (KeyboardInterrupt, FailurePolicy.UNCAPTURED, [8]),
        (EmitError("no proof", where="tokens=4"), FailurePolicy.RAISE, [8]),
        (EmitError("no proof", where="tokens=4"), FailurePolicy.UNCAPTURED, [1, 2, 8]),
    ],
)
def test_a_replay_that_is_not_proved_is_not_served(error, policy, left, monkeypatch) -> None:
    """Interrupted, the rest is uncaptured too."""
    real = captured_replay.generate_replay

    def fails(source, split_gm, facts):
        if facts.tokens == 4:
            raise error
        return real(source, split_gm, facts)

    monkeypatch.setattr(captured_replay, "generate_replay", fails)
    model, stitched = small()
    raises = pytest.raises((KeyboardInterrupt, EmitError)) if left == [8] else nullcontext()
    with raises:
        stitched.capture(SIZES, on_failure=policy, progress=False)
    assert sizes_of(stitched) == left
    assert sorted(key[1].num_tokens for key in stitched.memory_report().held) == left
    failures = {
        key[1].num_tokens: str(each) for key, each in stitched.static_graphs.failures.items()
    }
    assert list(failures) == ([] if error is KeyboardInterrupt else [4])
    assert all("no proof" in text for text in failures.values())
    served(stitched, model)


def test_a_budget_chooses_sizes_and_memory_stays_in_it() -> None:
    model, stitched = small()
    whole = stitched.capture(SIZES, progress=False).memory_report()
    assert whole.estimate is not None
    assert whole.estimate.total == pytest.approx(whole.total, rel=0.1)
    for share in (0.9, 0.6):
        budget = int(whole.total * share)
        report = stitched.capture(SIZES, memory_budget=budget, progress=False).memory_report()
        assert 0 < report.total <= budget
        dropped = {descriptor.num_tokens for _, descriptor in report.dropped}
        assert sorted(dropped | set(sizes_of(stitched))) == SIZES and dropped
        served(stitched, model)
    stitched.capture(SIZES, memory_budget=1, progress=False)
    assert sizes_of(stitched) == [] and stitched.memory_report().total == 0
    served(stitched, model)


def test_what_turns_out_too_expensive_is_given_up_while_capturing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The estimate was far too low, as on a GPU that somebody else uses meanwhile."""
    real = phase.estimate_memory

    def far_too_low(*args, **kwargs):
        found = real(*args, **kwargs)
        models = {kind: replace(model, pool=0.0) for kind, model in found.models.items()}
        return replace(found, models=models)

    monkeypatch.setattr(phase, "estimate_memory", far_too_low)
    model, stitched = small()
    stitched.capture([1, 2, 4], memory_budget=100, progress=False)
    assert sizes_of(stitched) == [4]  # the first tells what captures really take
    assert {key[1].num_tokens for key in stitched.memory_report().dropped} == {1, 2}
    served(stitched, model)
