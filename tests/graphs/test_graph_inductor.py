"""Static graphs over pieces that Inductor compiled: its kernels write where torch's dispatcher does not look."""

from __future__ import annotations

import pytest
import torch

from piecework.runtime.batch.descriptor import BatchDescriptor
from piecework.runtime.batch.forward_context import set_forward_context
from piecework.runtime.batch.mode import CUDAGraphMode
from piecework.runtime.graphs.memory.owner import StaticGraphs
from piecework.runtime.graphs.memory.wrapper import CUDAGraphOptions, CUDAGraphWrapper

pytestmark = pytest.mark.inductor
FULL = CUDAGraphMode.FULL


def piece(x, cache, weight, bias):
    y = torch.relu(x @ weight + bias)
    cache[: x.shape[0]].add_(y)
    return y, y.view(-1, 2, 2), cache[: x.shape[0]] * 2


@torch.no_grad()
def test_a_compiled_piece_with_mutation_and_views():
    torch.manual_seed(0)
    compiled = torch.compile(piece, dynamic=True, fullgraph=True)
    weight, bias = torch.randn(4, 4), torch.randn(4)
    x, cache = torch.randn(8, 4), torch.zeros(8, 4)
    graphs = StaticGraphs("cpu", address_policy="refuse", check_addresses=True)
    graphs.addresses.register_weights({"weight": weight, "bias": bias})
    graphs.addresses.register_persistent("x", x)
    graphs.addresses.register_persistent("cache", cache)
    wrapper = CUDAGraphWrapper(compiled, None, FULL, CUDAGraphOptions(), graphs=graphs)
    want_cache = cache.clone()

    def step(n):
        want = piece(x[:n], want_cache, weight, bias)
        with set_forward_context(cudagraph_runtime_mode=FULL, batch_descriptor=BatchDescriptor(n)):
            got = wrapper(x[:n], cache, weight, bias)
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one, other)
        # The cache was changed once: the capture itself computed nothing.
        torch.testing.assert_close(cache, want_cache)
        assert got[1].data_ptr() == got[0].data_ptr()

    with graphs.capturing():
        for n in (8, 5):
            step(n)
    for n in (5, 8, 5):
        x.copy_(torch.randn(8, 4))
        step(n)
