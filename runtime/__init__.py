"""The runtime: from a model to what runs. The field's names are here, whatever room they live in; each is loaded on first use.

Importing this package loads nothing else, so that a command line reads configurations without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from piecework.runtime.batch.coverage import coverage, require_coverage
    from piecework.runtime.batch.descriptor import BatchDescriptor, BatchKind
    from piecework.runtime.batch.dispatcher import CudagraphDispatcher
    from piecework.runtime.batch.forward_context import (
        ForwardContext,
        get_forward_context,
        set_forward_context,
    )
    from piecework.runtime.batch.mode import CUDAGraphMode
    from piecework.runtime.batch.ranges import Range
    from piecework.runtime.cache.artifacts import StandaloneCompiledArtifacts
    from piecework.runtime.compilers import (
        CompilerInterface,
        EagerAdaptor,
        InductorAdaptor,
        InductorStandaloneAdaptor,
        make_compiler,
    )
    from piecework.runtime.config.compilation import (
        CompilationConfig,
        CompilationMode,
        DynamicShapesConfig,
        DynamicShapesType,
        PassConfig,
        RuntimeConfig,
        StitchingConfig,
    )
    from piecework.runtime.counters import CompilationCounter, counters
    from piecework.runtime.decorators import (
        ignore_torch_compile,
        stitched_of,
        support_torch_compile,
    )
    from piecework.runtime.graphs.device.weak_ref import weak_ref_tensors
    from piecework.runtime.graphs.memory.wrapper import (
        CUDAGraphEntry,
        CUDAGraphOptions,
        CUDAGraphWrapper,
        wrap_with_cudagraph_if_needed,
    )
    from piecework.runtime.graphs.plan.options import CaptureOptions
    from piecework.runtime.graphs.serve.lazy import ConcreteSizeEntry, CUDAPiecewiseBackend
    from piecework.runtime.graphs.stage.copy_inputs import make_copy_and_call
    from piecework.runtime.model_tag import set_model_tag, set_on_compilation_complete
    from piecework.runtime.passes import (
        CallableInductorPass,
        InductorPass,
        PostGradPassManager,
        pass_context,
    )
    from piecework.runtime.pieces.backend import PieceworkBackend
    from piecework.runtime.pieces.manager import CompilerManager, RangeEntry
    from piecework.runtime.pieces.piecewise import (
        PiecewiseBackend,
        PiecewiseCompileInterpreter,
        create_concrete_args,
        get_fake_args_from_graph,
    )
    from piecework.runtime.splitting_op import declare_rows, splitting_op
    from piecework.runtime.stitched import StitchedModule

__all__ = [
    "BatchDescriptor",
    "BatchKind",
    "CUDAGraphEntry",
    "CUDAGraphMode",
    "CUDAGraphOptions",
    "CUDAGraphWrapper",
    "CUDAPiecewiseBackend",
    "CallableInductorPass",
    "CaptureOptions",
    "CompilationConfig",
    "CompilationCounter",
    "CompilationMode",
    "CompilerInterface",
    "CompilerManager",
    "ConcreteSizeEntry",
    "CudagraphDispatcher",
    "DynamicShapesConfig",
    "DynamicShapesType",
    "EagerAdaptor",
    "ForwardContext",
    "InductorAdaptor",
    "InductorPass",
    "InductorStandaloneAdaptor",
    "PassConfig",
    "PiecewiseBackend",
    "PiecewiseCompileInterpreter",
    "PieceworkBackend",
    "PostGradPassManager",
    "Range",
    "RangeEntry",
    "RuntimeConfig",
    "StandaloneCompiledArtifacts",
    "StitchedModule",
    "StitchingConfig",
    "counters",
    "coverage",
    "create_concrete_args",
    "declare_rows",
    "get_fake_args_from_graph",
    "get_forward_context",
    "ignore_torch_compile",
    "make_compiler",
    "make_copy_and_call",
    "pass_context",
    "require_coverage",
    "set_forward_context",
    "set_model_tag",
    "set_on_compilation_complete",
    "splitting_op",
    "stitched_of",
    "support_torch_compile",
    "weak_ref_tensors",
    "wrap_with_cudagraph_if_needed",
]

_HOME = {
    "BatchDescriptor": "piecework.runtime.batch.descriptor",
    "BatchKind": "piecework.runtime.batch.descriptor",
    "CUDAGraphEntry": "piecework.runtime.graphs.memory.wrapper",
    "CUDAGraphMode": "piecework.runtime.batch.mode",
    "CUDAGraphOptions": "piecework.runtime.graphs.memory.wrapper",
    "CUDAGraphWrapper": "piecework.runtime.graphs.memory.wrapper",
    "CUDAPiecewiseBackend": "piecework.runtime.graphs.serve.lazy",
    "CallableInductorPass": "piecework.runtime.passes",
    "CaptureOptions": "piecework.runtime.graphs.plan.options",
    "CompilationConfig": "piecework.runtime.config.compilation",
    "CompilationCounter": "piecework.runtime.counters",
    "CompilationMode": "piecework.runtime.config.compilation",
    "CompilerInterface": "piecework.runtime.compilers",
    "CompilerManager": "piecework.runtime.pieces.manager",
    "ConcreteSizeEntry": "piecework.runtime.graphs.serve.lazy",
    "CudagraphDispatcher": "piecework.runtime.batch.dispatcher",
    "DynamicShapesConfig": "piecework.runtime.config.compilation",
    "DynamicShapesType": "piecework.runtime.config.compilation",
    "EagerAdaptor": "piecework.runtime.compilers",
    "ForwardContext": "piecework.runtime.batch.forward_context",
    "InductorAdaptor": "piecework.runtime.compilers",
    "InductorPass": "piecework.runtime.passes",
    "InductorStandaloneAdaptor": "piecework.runtime.compilers",
    "PassConfig": "piecework.runtime.config.compilation",
    "PiecewiseBackend": "piecework.runtime.pieces.piecewise",
    "PiecewiseCompileInterpreter": "piecework.runtime.pieces.piecewise",
    "PieceworkBackend": "piecework.runtime.pieces.backend",
    "PostGradPassManager": "piecework.runtime.passes",
    "Range": "piecework.runtime.batch.ranges",
    "RangeEntry": "piecework.runtime.pieces.manager",
    "RuntimeConfig": "piecework.runtime.config.compilation",
    "StandaloneCompiledArtifacts": "piecework.runtime.cache.artifacts",
    "StitchedModule": "piecework.runtime.stitched",
    "StitchingConfig": "piecework.runtime.config.compilation",
    "counters": "piecework.runtime.counters",
    "coverage": "piecework.runtime.batch.coverage",
    "create_concrete_args": "piecework.runtime.pieces.piecewise",
    "declare_rows": "piecework.runtime.splitting_op",
    "get_fake_args_from_graph": "piecework.runtime.pieces.piecewise",
    "get_forward_context": "piecework.runtime.batch.forward_context",
    "ignore_torch_compile": "piecework.runtime.decorators",
    "make_compiler": "piecework.runtime.compilers",
    "make_copy_and_call": "piecework.runtime.graphs.stage.copy_inputs",
    "pass_context": "piecework.runtime.passes",
    "require_coverage": "piecework.runtime.batch.coverage",
    "set_forward_context": "piecework.runtime.batch.forward_context",
    "set_model_tag": "piecework.runtime.model_tag",
    "set_on_compilation_complete": "piecework.runtime.model_tag",
    "splitting_op": "piecework.runtime.splitting_op",
    "stitched_of": "piecework.runtime.decorators",
    "support_torch_compile": "piecework.runtime.decorators",
    "weak_ref_tensors": "piecework.runtime.graphs.device.weak_ref",
    "wrap_with_cudagraph_if_needed": "piecework.runtime.graphs.memory.wrapper",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
