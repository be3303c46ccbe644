"""Whole forwards as graphs: what operators say they can be captured in, models that share memory, streams that are joined."""

from __future__ import annotations

import pytest
import torch
from captured import calls
from models import EAGER, Block, mix_pair

import piecework
from piecework.errors import StaticGraphError
from piecework.runtime.batch.descriptor import BatchKind
from piecework.runtime.batch.forward_context import set_forward_context
from piecework.runtime.batch.mode import CUDAGraphMode
from piecework.runtime.config.compilation import RuntimeConfig
from piecework.runtime.graphs.plan.options import negotiated

FULL, PIECEWISE, NONE = CUDAGraphMode.FULL, CUDAGraphMode.PIECEWISE, CUDAGraphMode.NONE
BOTH, DECODE = CUDAGraphMode.FULL_AND_PIECEWISE, CUDAGraphMode.FULL_DECODE_ONLY


def stitch() -> tuple[Block, piecework.StitchedModule]:
    model = Block(mix_pair)
    return model, piecework.compile(model, (torch.randn(8, 8),), config=EAGER)


@pytest.fixture
def says():
    """What the operator says, taken back afterwards."""
    yield lambda what: piecework.declare_full_graphs("pairs::mix", what)
    piecework.declare_full_graphs("pairs::mix", None)


# --- what can be captured --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "lens", "full", "both", "decode"),
    [
        ("always", (1,), FULL, BOTH, DECODE),
        ("always", (1, 4), FULL, BOTH, DECODE),
        ("uniform_decode", (1, 4), BOTH, BOTH, DECODE),
        ("single_token_decode", (1,), BOTH, BOTH, DECODE),
        ("single_token_decode", (4,), PIECEWISE, PIECEWISE, NONE),
        ("never", (1,), PIECEWISE, PIECEWISE, NONE),
    ],
)
def test_a_mode_is_lowered_to_what_every_operator_can_be_captured_in(
    said, lens, full, both, decode
):
    for asked, mode in ((FULL, full), (BOTH, both), (DECODE, decode)):
        found, able, why = negotiated(asked, {"a": "always", "b": said}, lens)
        assert (found, able) == (mode, lens)
        assert bool(why) == (found is not asked) and ("b " in why or not why)
    assert negotiated(PIECEWISE, {"b": said}, lens) == (PIECEWISE, lens, "")
    assert negotiated(FULL, {}, lens) == (FULL, lens, "")


@pytest.mark.parametrize(
    ("said", "asked", "served"),
    [
        (None, "FULL", {(True, "FULL"), (False, "FULL")}),
        ("uniform_decode", "FULL", {(True, "FULL"), (False, "PIECEWISE")}),
        ("never", "FULL_AND_PIECEWISE", {(True, "PIECEWISE"), (False, "PIECEWISE")}),
    ],
)
@torch.no_grad()
def test_a_model_is_captured_as_its_operators_allow(says, warned, said, asked, served):
    says(said)
    model, stitched = stitch()
    stitched.capture([2, 4], mode=asked, progress=False)
    found = set()
    for uniform in (True, False):
        x = torch.randn(2, 8)
        stitched.static_graphs.count_anew()
        with set_forward_context(batch=BatchKind(uniform_decode=uniform)):
            torch.testing.assert_close(stitched(x), model(x))
        [mode] = calls(stitched, "mode")
        found.add((uniform, mode))
    assert found == served
    lowered = [text for text in warned if "less than a whole forward" in text]
    assert len(lowered) == (said is not None)


def test_what_cannot_be_lowered_or_must_not_be_is_refused(says):
    says("never")
    _, stitched = stitch()
    for options in ({"mode": "FULL_DECODE_ONLY"}, {"mode": "FULL", "strict": True}):
        with pytest.raises(StaticGraphError, match="pairs::mix can't be captured"):
            stitched.capture([2], progress=False, **options)


@torch.no_grad()
def test_drafts_of_several_widths_have_graphs_where_they_can(says):
    model, stitched = stitch()
    runtime = RuntimeConfig(
        max_num_batched_tokens=64,
        max_num_seqs=8,
        uniform_decode_query_len=4,
        further_decode_query_lens=(1,),
    )
    for said, captured in ((None, {1, 4}), ("single_token_decode", {1})):
        says(said)
        stitched.capture([4, 8], mode="FULL_AND_PIECEWISE", runtime=runtime, progress=False)
        keys = stitched.static_graphs.dispatcher.cudagraph_keys[FULL]
        assert {key.num_tokens // key.num_reqs for key in keys} == captured
        for width in (1, 4, None):  # of a batch that doesn't say, the widest is meant
            x = torch.randn(8, 8)
            with set_forward_context(batch=BatchKind(uniform_decode=True, query_len=width)):
                torch.testing.assert_close(stitched(x), model(x))
        assert calls(stitched, "mode") == (
            {"FULL": 3} if said is None else {"FULL": 1, "PIECEWISE": 2}
        )


# --- one pool for several models ------------------------------------------------------------------------


@torch.no_grad()
def test_models_that_share_memory_take_less_and_stay_right():
    (target, one), (draft, two), (_, alone) = stitch(), stitch(), stitch()
    one.capture([2, 8], progress=False, estimate=False)
    alone.capture([2, 8], progress=False, estimate=False)
    pool = one.static_graphs.graphs.pool
    before = pool.nbytes
    two.capture([2, 8], progress=False, estimate=False, memory_of=one.static_graphs.graphs)
    assert two.static_graphs.graphs.pool is pool
    assert pool.nbytes - before < alone.static_graphs.graphs.pool.nbytes
    for size in (8, 2, 3, 8):
        x = torch.randn(size, 8)
        first, second = one(x), two(x)
        torch.testing.assert_close(first, target(x))
        torch.testing.assert_close(second, draft(x))
    assert {row.mode for row in (*one.call_report(), *two.call_report())} == {"PIECEWISE"}
    one.static_graphs.release()
    x = torch.randn(8, 8)
    torch.testing.assert_close(two(x), draft(x))
    assert pool.nbytes, "the other's graphs keep it"
    assert {row.mode for row in two.call_report()} == {"PIECEWISE"}
    two.static_graphs.release()
    assert not pool.nbytes


# --- other streams ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_streams_are_joined_before_captures_and_served_calls():
    model, stitched = stitch()
    joined = []
    stitched.capture([2], join=lambda: joined.append(1), progress=False, estimate=False)
    captured = len(joined)
    assert captured >= 2, "for the capture, and for the replay that checks it"
    x = torch.randn(2, 8)
    torch.testing.assert_close(stitched(x), model(x))
    assert len(joined) == captured + 1
    stitched(torch.randn(5, 8))  # runs uncaptured
    assert len(joined) == captured + 1
