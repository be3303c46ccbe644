"""What must not break a process on a GPU: captures that fail, inputs at odd addresses. In a file of its own, as a mistake here ends the device's use."""

from __future__ import annotations

import pytest
import torch
from gpu_models import (
    DEVICE,
    EAGER,
    INDUCTOR,
    assert_alike,
    needs_cuda,
    needs_device,
    stitched_decoder,
)

import piecework
from piecework.errors import StaticGraphError

pytestmark = [pytest.mark.gpu, needs_device]


@needs_cuda
def test_a_pool_of_the_callers_that_takes_the_memory_of_captures_is_refused():
    model, stitched = stitched_decoder(EAGER)
    pool = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(pool), pytest.raises(StaticGraphError, match="use_mem_pool"):
        stitched.capture([4, 8], progress=False, estimate=False)
    stitched.capture([4, 8], progress=False, estimate=False)
    assert_alike(stitched, model, (3, 4, 8))


class Wide(torch.nn.Module):
    """Reads its input in whole words of 16 bytes where it may."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x) * 2 + 1


@pytest.mark.inductor
@pytest.mark.parametrize("inside", [False, True])
def test_an_input_at_an_odd_address(inside):
    """The example was aligned; ``x[1:]`` of a longer tensor is not."""
    config = INDUCTOR.replace(use_inductor_graph_partition=inside, splitting_ops=())
    model = Wide()
    stitched = piecework.compile(model, (torch.randn(256, 64, device=DEVICE),), config=config)
    memory = torch.randn(64 * 64 + 1, device=DEVICE)
    odd = memory[1:].view(64, 64)
    assert odd.data_ptr() % 16
    with torch.no_grad():
        torch.testing.assert_close(stitched(odd), model(odd))
        if not inside:
            stitched.capture([64], progress=False)
            torch.testing.assert_close(stitched(odd), model(odd))
