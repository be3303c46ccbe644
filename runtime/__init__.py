"""The runtime: from a model to what runs. The field's names are here, whatever room they live in; each is loaded on first use.

Importing this package loads nothing else, so that a command line reads configurations without torch.
"""

# ruff: noqa: F401  (what is imported for type checkers is what the package hands on)

from __future__ import annotations

from typing import TYPE_CHECKING

from piecework.faces import face

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
    from piecework.runtime.splitting_op import declare_full_graphs, declare_rows, splitting_op
    from piecework.runtime.stitched import StitchedModule

__all__, __getattr__, __dir__ = face(__name__, __file__)
