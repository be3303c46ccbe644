"""Axes of the newest dispatchers: the longest query is a bound, the number of micro-batches a value."""

from __future__ import annotations

import pytest

from piecework.runtime.batch.dispatcher import CudagraphDispatcher, Reason
from piecework.runtime.batch.mode import CUDAGraphMode

AXES = {"max_query_len": [4, 1, 16], "num_ubatches": [1, 2]}


def dispatcher(mode: str = "FULL") -> CudagraphDispatcher:
    return CudagraphDispatcher(CUDAGraphMode.parse(mode), [8, 16], max_num_seqs=16, axes=AXES)


@pytest.mark.parametrize(
    ("query_len", "captured"), [(1, 1), (2, 4), (4, 4), (5, 16), (16, 16), (None, 16)]
)
def test_a_batch_runs_in_a_graph_of_the_next_longer_query(query_len, captured):
    axes = {} if query_len is None else {"max_query_len": query_len}
    mode, descriptor = dispatcher().dispatch(7, axes=axes)
    assert mode is CUDAGraphMode.FULL and descriptor.num_tokens == 8
    assert dict(descriptor.extra) == {"max_query_len": captured, "num_ubatches": 1}


def test_a_longer_query_than_any_runs_uncaptured_and_says_why():
    found = dispatcher()
    mode, descriptor = found.dispatch(7, axes={"max_query_len": 17})
    assert mode is CUDAGraphMode.NONE and dict(descriptor.extra)["max_query_len"] == 17
    from piecework.runtime.batch.descriptor import BatchKind

    assert found.explain(7, BatchKind.of(axes={"max_query_len": 17})).reason is Reason.AXIS


def test_micro_batches_are_a_value_of_their_own():
    found = dispatcher("PIECEWISE")
    for count in (1, 2):
        _, descriptor = found.dispatch(7, axes={"num_ubatches": count, "max_query_len": 3})
        assert dict(descriptor.extra) == {"max_query_len": 4, "num_ubatches": count}
    assert found.dispatch(7, axes={"num_ubatches": 3})[0] is CUDAGraphMode.NONE
