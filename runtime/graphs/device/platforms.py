"""Which static graphs a device has."""

from __future__ import annotations

import torch

from piecework.errors import StaticGraphError
from piecework.runtime.graphs.device.contract import GraphPlatform
from piecework.runtime.graphs.device.cpu import CpuGraphPlatform
from piecework.runtime.graphs.device.cuda import CudaGraphPlatform


def platform_for(device: torch.device | str) -> GraphPlatform:
    """The platform that captures on ``device``; a `StaticGraphError` where none does."""
    device = torch.device(device)
    if device.type == "cpu":
        return CpuGraphPlatform()
    if device.type == "cuda":
        return CudaGraphPlatform(device)
    raise StaticGraphError(
        f"no static graphs on {device.type!r} devices",
        where=str(device),
        hint="use cudagraph_mode NONE, or a CPU or CUDA device",
    )
