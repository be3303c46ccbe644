"""Beneath torch's CUDA graphs. In: a graph whose capture failed, or a device. Out: its allocator fit for the next capture.

Nothing here is called while a capture goes well.
"""

from __future__ import annotations

import contextlib
import ctypes

import torch


def abandon_capture(graph: torch.cuda.CUDAGraph, device: torch.device, pool: object) -> None:
    """End a capture that failed: its stream leaves capture mode, and the allocator lets go of ``pool`` for it.

    Where an operation made a capture invalid, ``capture_end`` raises before it tells the allocators, so it is done by hand: else the
    pool would go on recording, and the graph's reference to it never be given back. The allocator of pinned memory can't be told. It
    keeps asking this graph whether it captures, so the graph is kept for good; and it refuses to record to ``pool`` again, so the
    next capture needs another one.
    """
    # The error to report is the one that made the capture fail; what is raised here only follows from it.
    with contextlib.suppress(RuntimeError):
        graph.capture_end()
    try:
        torch._C._cuda_endAllocateToPool(device.index, pool)  # type: ignore[attr-defined]
    except RuntimeError:
        pass  # it records no longer: capture_begin did not get that far, or capture_end did
    else:
        torch._C._cuda_releasePool(device.index, pool)  # type: ignore[attr-defined]
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(graph))
    graph.reset()


def clear_cublas_workspaces() -> None:
    """Let go of the workspaces that torch keeps for each cuBLAS handle and stream; the next product takes another.

    torch does it by itself around the graphs of ``mode="reduce-overhead"``, so a graph must not rely on one that lies outside its
    own pool.
    """
    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if clear is not None:
        clear()
