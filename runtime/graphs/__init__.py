"""Static graphs: in, callables and batch shapes; out, captures that are replayed. The names below are loaded on first use.

Importing this package loads nothing else, so that a configuration can name a mode without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from piecework.runtime.batch.coverage import coverage, coverage_table, require_coverage
    from piecework.runtime.batch.descriptor import BatchDescriptor, BatchKind
    from piecework.runtime.batch.mode import CUDAGraphMode
    from piecework.runtime.graphs.device.platforms import platform_for
    from piecework.runtime.graphs.device.weak_ref import weak_ref_tensor, weak_ref_tensors
    from piecework.runtime.graphs.memory.addresses import AddressBook, AddressPolicy, ValueOrigin
    from piecework.runtime.graphs.memory.owner import StaticGraphs
    from piecework.runtime.graphs.memory.wrapper import (
        CUDAGraphEntry,
        CUDAGraphOptions,
        CUDAGraphWrapper,
        wrap_with_cudagraph_if_needed,
    )
    from piecework.runtime.graphs.plan.estimate import MemoryEstimate, estimate_memory, fit_budget
    from piecework.runtime.graphs.plan.phase import CaptureReport, FailurePolicy, capture_graphs
    from piecework.runtime.graphs.plan.progress import CaptureProgress
    from piecework.runtime.graphs.serve.lazy import ConcreteSizeEntry, CUDAPiecewiseBackend

_HOME = {
    "AddressBook": "piecework.runtime.graphs.memory.addresses",
    "AddressPolicy": "piecework.runtime.graphs.memory.addresses",
    "BatchDescriptor": "piecework.runtime.batch.descriptor",
    "BatchKind": "piecework.runtime.batch.descriptor",
    "CUDAGraphEntry": "piecework.runtime.graphs.memory.wrapper",
    "CUDAGraphMode": "piecework.runtime.batch.mode",
    "CUDAGraphOptions": "piecework.runtime.graphs.memory.wrapper",
    "CUDAGraphWrapper": "piecework.runtime.graphs.memory.wrapper",
    "CUDAPiecewiseBackend": "piecework.runtime.graphs.serve.lazy",
    "CaptureProgress": "piecework.runtime.graphs.plan.progress",
    "CaptureReport": "piecework.runtime.graphs.plan.phase",
    "ConcreteSizeEntry": "piecework.runtime.graphs.serve.lazy",
    "FailurePolicy": "piecework.runtime.graphs.plan.phase",
    "MemoryEstimate": "piecework.runtime.graphs.plan.estimate",
    "StaticGraphs": "piecework.runtime.graphs.memory.owner",
    "ValueOrigin": "piecework.runtime.graphs.memory.addresses",
    "capture_graphs": "piecework.runtime.graphs.plan.phase",
    "coverage": "piecework.runtime.batch.coverage",
    "coverage_table": "piecework.runtime.batch.coverage",
    "estimate_memory": "piecework.runtime.graphs.plan.estimate",
    "fit_budget": "piecework.runtime.graphs.plan.estimate",
    "platform_for": "piecework.runtime.graphs.device.platforms",
    "require_coverage": "piecework.runtime.batch.coverage",
    "weak_ref_tensor": "piecework.runtime.graphs.device.weak_ref",
    "weak_ref_tensors": "piecework.runtime.graphs.device.weak_ref",
    "wrap_with_cudagraph_if_needed": "piecework.runtime.graphs.memory.wrapper",
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
    return getattr(importlib.import_module(_HOME[name]), name)
