"""Inductor's own graph partition on a GPU: a CUDA graph per partition, splitting ops live between them, the same results."""

from __future__ import annotations

import pytest
import torch
from torch import nn

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


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.ModuleList(nn.Linear(64, 128) for _ in range(2))
        self.leave = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index, enter in enumerate(self.enter):
            left, right = enter(x).chunk(2, -1)
            out = torch.empty_like(left)
            mix(left, right, out, f"layers.{index}")
            x = x + self.leave(out)
        return x


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
