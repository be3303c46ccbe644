"""Static graphs: in, callables and batch shapes; out, captures that are replayed. The names below are loaded on first use.

Importing this package loads nothing else, so that a configuration can name a mode without torch.
"""

# ruff: noqa: F401  (what is imported for type checkers is what the package hands on)

from __future__ import annotations

from typing import TYPE_CHECKING

from piecework.faces import face

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

__all__, __getattr__, __dir__ = face(__name__, __file__)
