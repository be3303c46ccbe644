"""Static graphs: callables captured per batch shape, and replayed; names load on first use.

Importing this package loads nothing else, so that a configuration can name a mode without torch.
"""

from typing import TYPE_CHECKING

from piecework.faces import face

if TYPE_CHECKING:
    from piecework.runtime.batch.coverage import coverage as coverage
    from piecework.runtime.batch.coverage import require_coverage as require_coverage
    from piecework.runtime.batch.descriptor import BatchDescriptor as BatchDescriptor
    from piecework.runtime.batch.descriptor import BatchKind as BatchKind
    from piecework.runtime.batch.mode import CUDAGraphMode as CUDAGraphMode
    from piecework.runtime.graphs.device.contract import weak_ref_tensor as weak_ref_tensor
    from piecework.runtime.graphs.device.contract import weak_ref_tensors as weak_ref_tensors
    from piecework.runtime.graphs.memory.addresses import AddressBook as AddressBook
    from piecework.runtime.graphs.memory.addresses import AddressPolicy as AddressPolicy
    from piecework.runtime.graphs.memory.addresses import ValueOrigin as ValueOrigin
    from piecework.runtime.graphs.memory.owner import StaticGraphs as StaticGraphs
    from piecework.runtime.graphs.memory.owner import platform_for as platform_for
    from piecework.runtime.graphs.memory.wrapper import CUDAGraphEntry as CUDAGraphEntry
    from piecework.runtime.graphs.memory.wrapper import CUDAGraphOptions as CUDAGraphOptions
    from piecework.runtime.graphs.memory.wrapper import CUDAGraphWrapper as CUDAGraphWrapper
    from piecework.runtime.graphs.memory.wrapper import (
        wrap_with_cudagraph_if_needed as wrap_with_cudagraph_if_needed,
    )
    from piecework.runtime.graphs.plan.phase import CaptureProgress as CaptureProgress
    from piecework.runtime.graphs.plan.phase import CaptureReport as CaptureReport
    from piecework.runtime.graphs.plan.phase import FailurePolicy as FailurePolicy
    from piecework.runtime.graphs.plan.phase import MemoryEstimate as MemoryEstimate
    from piecework.runtime.graphs.plan.phase import capture_graphs as capture_graphs
    from piecework.runtime.graphs.plan.phase import estimate_memory as estimate_memory
    from piecework.runtime.graphs.plan.phase import fit_budget as fit_budget
    from piecework.runtime.graphs.serve.lazy import ConcreteSizeEntry as ConcreteSizeEntry
    from piecework.runtime.graphs.serve.lazy import CUDAPiecewiseBackend as CUDAPiecewiseBackend

__all__, __getattr__, __dir__ = face(__name__, __file__)
