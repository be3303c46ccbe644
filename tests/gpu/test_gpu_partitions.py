"""Inductor's own graph partition on a GPU: a CUDA graph per partition, splitting ops live between them, the same results."""

from __future__ import annotations

import pytest
import torch
from models import Block, Layers

import piecework
from piecework.runtime.batch.forward_context import current_forward_context, set_forward_context

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.inductor,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@piecework.splitting_op("gpu_partitions::mix", mutates_args=("out",), rows="independent")
def mix(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor, name: str) -> None:
    context = current_forward_context()
    scale = 2 if context is None or context.attn_metadata is None else context.attn_metadata
    out.copy_(left - scale * right)


class Model(Layers):
    def __init__(self) -> None:
        super().__init__(Block(mix, f"layers.{i}", width=64) for i in range(2))


def test_each_partition_is_a_cuda_graph() -> None:
    model = Model().cuda()
    config = piecework.CompilationConfig(
        use_inductor_graph_partition=True, splitting_ops=["gpu_partitions::mix"]
    )
    stitched = piecework.compile(model, (torch.randn(4, 64, device="cuda"),), config=config)
    with piecework.counters.expect(num_cudagraph_captured=3 * 3):
        stitched.capture([2, 4, 8], progress=False)
    with torch.no_grad():
        for batch in (1, 2, 3, 7, 8, 11):
            x = torch.randn(batch, 64, device="cuda")
            torch.testing.assert_close(stitched(x), model(x), rtol=1e-3, atol=1e-3)
            with set_forward_context(5):  # read at each call, not at the capture
                torch.testing.assert_close(stitched(x), model(x), rtol=1e-3, atol=1e-3)
