"""Static graphs: in, callables and batch shapes; out, captures that are replayed. The names below are loaded on first use.

Importing this package loads nothing else, so that a configuration can name a mode without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from piecework.runtime.graphs.address import AddressBook, AddressPolicy, ValueOrigin
    from piecework.runtime.graphs.capture import CaptureReport, FailurePolicy, capture_graphs
    from piecework.runtime.graphs.covered import coverage, coverage_table, require_coverage
    from piecework.runtime.graphs.descriptor import BatchDescriptor, BatchKind
    from piecework.runtime.graphs.lazy import ConcreteSizeEntry, CUDAPiecewiseBackend
    from piecework.runtime.graphs.memory import MemoryEstimate, estimate_memory, fit_budget
    from piecework.runtime.graphs.mode import CUDAGraphMode
    from piecework.runtime.graphs.owner import StaticGraphs
    from piecework.runtime.graphs.platforms import platform_for
    from piecework.runtime.graphs.progress import CaptureProgress
    from piecework.runtime.graphs.runner import GraphRunner
    from piecework.runtime.graphs.weak_ref import weak_ref_tensor, weak_ref_tensors
    from piecework.runtime.graphs.wrapper import (
        CUDAGraphEntry,
        CUDAGraphOptions,
        CUDAGraphWrapper,
        wrap_with_cudagraph_if_needed,
    )

_HOME = {
    "AddressBook": "address",
    "AddressPolicy": "address",
    "BatchDescriptor": "descriptor",
    "BatchKind": "descriptor",
    "CUDAGraphEntry": "wrapper",
    "CUDAGraphMode": "mode",
    "CUDAGraphOptions": "wrapper",
    "CUDAGraphWrapper": "wrapper",
    "CUDAPiecewiseBackend": "lazy",
    "CaptureProgress": "progress",
    "CaptureReport": "capture",
    "ConcreteSizeEntry": "lazy",
    "FailurePolicy": "capture",
    "GraphRunner": "runner",
    "MemoryEstimate": "memory",
    "StaticGraphs": "owner",
    "ValueOrigin": "address",
    "capture_graphs": "capture",
    "coverage": "covered",
    "coverage_table": "covered",
    "estimate_memory": "memory",
    "fit_budget": "memory",
    "platform_for": "platforms",
    "require_coverage": "covered",
    "weak_ref_tensor": "weak_ref",
    "weak_ref_tensors": "weak_ref",
    "wrap_with_cudagraph_if_needed": "wrapper",
}

__all__ = [
    "AddressBook",
    "AddressPolicy",
    "BatchDescriptor",
    "BatchKind",
    "CUDAGraphEntry",
    "CUDAGraphMode",
    "CUDAGraphOptions",
    "CUDAGraphWrapper",
    "CUDAPiecewiseBackend",
    "CaptureProgress",
    "CaptureReport",
    "ConcreteSizeEntry",
    "FailurePolicy",
    "GraphRunner",
    "MemoryEstimate",
    "StaticGraphs",
    "ValueOrigin",
    "capture_graphs",
    "coverage",
    "coverage_table",
    "estimate_memory",
    "fit_budget",
    "platform_for",
    "require_coverage",
    "weak_ref_tensor",
    "weak_ref_tensors",
    "wrap_with_cudagraph_if_needed",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
