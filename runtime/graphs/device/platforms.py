"""Which static graphs a device has: in, a device; out, the platform that captures on it.

It never falls back from one device to another.
"""

from __future__ import annotations

import torch

from piecework.errors import StaticGraphError
from piecework.runtime.graphs.device.contract import GraphPlatform
from piecework.runtime.graphs.device.cpu import CpuGraphPlatform
from piecework.runtime.graphs.device.cuda import CudaGraphPlatform


def platform_for(device: torch.device | str) -> GraphPlatform:
    """The platform that captures on ``device``.

    Raises:
        StaticGraphError: neither a CPU nor a CUDA device, or CUDA isn't available.
    """
    device = torch.device(device)
    match device.type:
        case "cpu":
            return CpuGraphPlatform()
        case "cuda":
            return CudaGraphPlatform(device)
        case _:
            raise StaticGraphError(
                f"no static graphs on {device.type!r} devices",
                where=str(device),
                hint="use cudagraph_mode NONE, or a CPU or CUDA device",
            )
