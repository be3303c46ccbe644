"""The forward context: nested, per thread and task, frozen."""

from __future__ import annotations

import threading

import pytest

from piecework.errors import InputError
from piecework.runtime.batch.descriptor import BatchDescriptor
from piecework.runtime.batch.forward_context import (
    current_forward_context,
    get_forward_context,
    override_forward_context,
    set_forward_context,
)
from piecework.runtime.batch.mode import CUDAGraphMode


def test_what_was_set_is_seen():
    metadata, state = object(), {"cache": [1]}
    with set_forward_context(
        metadata,
        cudagraph_runtime_mode=CUDAGraphMode.FULL,
        batch_descriptor=BatchDescriptor(4),
        skip_cuda_graphs=True,
        state=state,
    ) as given:
        context = get_forward_context()
        assert context is given is current_forward_context()
        assert context.attn_metadata is metadata
        assert context.cudagraph_runtime_mode is CUDAGraphMode.FULL
        assert context.batch_descriptor == BatchDescriptor(4)
        assert context.skip_cuda_graphs
        assert context.state is state
    assert current_forward_context() is None


def test_nested_and_back_after_an_error():
    with set_forward_context("outer"):
        with pytest.raises(KeyError), set_forward_context("inner"):
            assert get_forward_context().attn_metadata == "inner"
            raise KeyError
        assert get_forward_context().attn_metadata == "outer"
        with override_forward_context(None):
            assert current_forward_context() is None
        assert get_forward_context().attn_metadata == "outer"


def test_threads_do_not_see_each_other():
    seen = []
    ready, done = threading.Event(), threading.Event()

    def other():
        seen.append(current_forward_context())
        with set_forward_context("other"):
            ready.set()
            done.wait(10)
            seen.append(get_forward_context().attn_metadata)

    with set_forward_context("mine"):
        thread = threading.Thread(target=other)
        thread.start()
        assert ready.wait(10)
        assert get_forward_context().attn_metadata == "mine"
        done.set()
        thread.join()
    assert seen == [None, "other"]


@pytest.mark.parametrize("mode", [m for m in CUDAGraphMode if m.separate_routine()])
def test_a_pair_of_modes_is_an_error(mode):
    with (
        pytest.raises(InputError, match=f"{mode.name} is a pair of modes"),
        set_forward_context(cudagraph_runtime_mode=mode),
    ):
        pass
