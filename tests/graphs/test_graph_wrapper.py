"""The wrapper: when it captures, replays or steps aside; warm-ups, nesting, phases, owners."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from piecework.errors import ConfigError, StaticGraphError
from piecework.runtime.batch.descriptor import BatchDescriptor
from piecework.runtime.batch.forward_context import set_forward_context
from piecework.runtime.batch.mode import CUDAGraphMode
from piecework.runtime.graphs.memory.owner import StaticGraphs
from piecework.runtime.graphs.memory.wrapper import (
    CUDAGraphOptions,
    CUDAGraphWrapper,
)

NONE, PIECEWISE, FULL = CUDAGraphMode.NONE, CUDAGraphMode.PIECEWISE, CUDAGraphMode.FULL


class Counted:
    """Adds one, and counts how often its Python runs."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x, *rest):
        self.calls += 1
        return x + 1


def context(mode, tokens, **options):
    return set_forward_context(
        cudagraph_runtime_mode=mode, batch_descriptor=BatchDescriptor(tokens), **options
    )


def settings(warmups=0, mode=PIECEWISE):
    return SimpleNamespace(cudagraph_num_of_warmups=warmups, cudagraph_mode=mode)


def piece(graphs, **told):
    return CUDAGraphWrapper(Counted(), None, PIECEWISE, graphs=graphs, **told)


@pytest.fixture
def graphs():
    return StaticGraphs("cpu")


@pytest.fixture
def x(graphs):
    x = torch.zeros(4)
    graphs.addresses.register_persistent("x", x)
    return x


def is_static(wrapper, value, tokens):
    entry = wrapper.concrete_cudagraph_entries.get(BatchDescriptor(tokens))
    return entry and entry.record and value.data_ptr() == entry.output.data_ptr()


@pytest.mark.parametrize(
    "enter",
    [
        lambda: context(NONE, 4),
        lambda: context(FULL, 4),
        lambda: context(PIECEWISE, 4, skip_cuda_graphs=True),
        lambda: set_forward_context(),
    ],
    ids=["none", "other-mode", "skipped", "bare"],
)
def test_it_steps_aside(graphs, x, enter):
    wrapper = piece(graphs)
    with graphs.capturing(), enter():
        fresh = wrapper(x)
    assert fresh.tolist() == [1.0] * 4
    assert graphs.records == []
    with graphs.capturing(), context(PIECEWISE, 4):
        wrapper(x)
    with enter():
        out = wrapper(x)
    assert not is_static(wrapper, out, 4)
    assert not is_static(wrapper, wrapper(x), 4)
    assert len(graphs.records) == 1


def test_warm_ups_come_first(graphs, x):
    runnable = Counted()
    wrapper = CUDAGraphWrapper(runnable, settings(warmups=2), PIECEWISE, graphs=graphs)
    with graphs.capturing(), context(PIECEWISE, 4):
        wrapper(x)
        wrapper(x)
        assert graphs.records == []
        assert runnable.calls == 2
        wrapper(x)
        assert len(graphs.records) == 1


def test_capturing_outside_the_phase_is_an_error(graphs, x):
    wrapper = piece(graphs, name="submod_3")
    with context(PIECEWISE, 4), pytest.raises(StaticGraphError) as error:
        wrapper(x)
    assert "capture outside the capture phase (submod_3, PIECEWISE tokens=4)" in str(error.value)
    with context(NONE, 4):
        assert wrapper(x).tolist() == [1.0] * 4


def test_a_mode_without_a_descriptor_is_an_error(graphs, x):
    wrapper = piece(graphs)
    with (
        graphs.capturing(),
        set_forward_context(cudagraph_runtime_mode=PIECEWISE),
        pytest.raises(StaticGraphError, match="PIECEWISE without a batch descriptor"),
    ):
        wrapper(x)


def test_full_outside_piecewise_nest_and_the_context_picks(graphs, x):
    inner = piece(graphs, name="inner")
    outer = CUDAGraphWrapper(lambda x: inner(x) * 10, None, FULL, graphs=graphs, name="outer")
    with graphs.capturing():
        for mode in (PIECEWISE, FULL):
            with context(mode, 4):
                assert outer(x).tolist() == [10.0] * 4
    assert [(r.name, r.mode) for r in graphs.records] == [("inner", PIECEWISE), ("outer", FULL)]
    x.fill_(1)
    for mode in (PIECEWISE, FULL, NONE):
        with context(mode, 4):
            out = outer(x)
        assert out.tolist() == [20.0] * 4
        assert bool(is_static(outer, out, 4)) is (mode is FULL)


def test_composite_and_none_modes_can_not_wrap(graphs):
    for mode in (NONE, CUDAGraphMode.FULL_AND_PIECEWISE, None):
        with pytest.raises(ConfigError, match=f"PIECEWISE or FULL, not {mode}"):
            CUDAGraphWrapper(Counted(), None, mode, graphs=graphs)


@pytest.mark.parametrize("weak", [False, True])
def test_who_owns_the_output(graphs, x, weak):
    options = CUDAGraphOptions(weak_ref_output=weak)
    wrapper = CUDAGraphWrapper(Counted(), None, PIECEWISE, options, graphs=graphs)
    other = piece(graphs)
    with graphs.capturing(), context(PIECEWISE, 4):
        out = wrapper(x)
        address = out.data_ptr()
        second = other(x)
    assert (second.data_ptr() == address) is weak
    entry = wrapper.concrete_cudagraph_entries[BatchDescriptor(4)]
    assert entry.output.data_ptr() == address


def test_an_owner_by_default(x):
    wrapper = CUDAGraphWrapper(Counted(), None, FULL)
    with context(FULL, 4):
        first = wrapper(x)
        x.fill_(2)
        assert wrapper(x).tolist() == [3.0] * 4
        # Nobody vouched for x, so it is staged: another tensor of the same layout works too.
        assert wrapper(torch.full((4,), 9.0)).tolist() == [10.0] * 4
    assert first.tolist() == [10.0] * 4


def test_pieces_of_a_shape_are_captured_in_one_forward():
    graphs = StaticGraphs("cpu", lazy=True)
    x = torch.zeros(4)
    graphs.addresses.register_persistent("x", x)
    one, two = piece(graphs, name="submod_0"), piece(graphs, name="submod_2")

    def forward():
        with context(PIECEWISE, 4):
            return two(one(x))

    # A forward that fails between the two pieces leaves only the first captured.
    with context(PIECEWISE, 4):
        one(x)
    with pytest.raises(StaticGraphError, match=r"captured in another forward \(submod_2, "):
        forward()
    assert graphs.records == []
    assert forward().tolist() == [2.0] * 4
    x.fill_(1)
    assert forward().tolist() == [3.0] * 4
    assert len(graphs.records) == 2


def test_discard_and_clear(graphs, x):
    wrapper = piece(graphs)
    with graphs.capturing():
        for n in (4, 2):
            with context(PIECEWISE, n):
                wrapper(x[:n])
    graphs.discard(FULL, BatchDescriptor(4))
    assert len(wrapper.concrete_cudagraph_entries) == 2
    graphs.discard(PIECEWISE, BatchDescriptor(4))
    assert list(wrapper.concrete_cudagraph_entries) == [BatchDescriptor(2)]
    assert [record.descriptor.num_tokens for record in graphs.records] == [2]
    graphs.clear_all_graphs()
    assert wrapper.concrete_cudagraph_entries == {}
    assert (graphs.records, graphs.nbytes) == ([], 0)
    with context(PIECEWISE, 2), pytest.raises(StaticGraphError, match="outside the capture phase"):
        wrapper(x[:2])
