"""Inductor's own graph partition on a GPU: a CUDA graph per partition, splitting ops live between them, the same results."""

from __future__ import annotations

import pytest
from gpu_models import INDUCTOR, assert_alike, needs_cuda, stitched_decoder

import piecework
from piecework.runtime.batch.forward_context import set_forward_context


@pytest.mark.gpu
@pytest.mark.inductor
@needs_cuda
def test_each_partition_is_a_cuda_graph() -> None:
    config = INDUCTOR.replace(use_inductor_graph_partition=True, splitting_ops=["gpu_tests::mix"])
    model, stitched = stitched_decoder(config, layers=2)
    with piecework.counters.expect(num_cudagraph_captured=3 * 3):
        stitched.capture([2, 4, 8], progress=False)
    for metadata in (None, 5):  # read at each call, not at the capture
        with set_forward_context(metadata):
            assert_alike(stitched, model, (1, 2, 3, 7, 8, 11))
