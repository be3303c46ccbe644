"""The runtime, from a model to what runs; each of the field's names is loaded on first use.

Importing it loads nothing else, so that a command line reads configurations without torch.
"""

from typing import TYPE_CHECKING

from piecework.faces import face

if TYPE_CHECKING:
    from piecework.runtime.batch.coverage import coverage as coverage
    from piecework.runtime.batch.coverage import require_coverage as require_coverage
    from piecework.runtime.batch.descriptor import BatchDescriptor as BatchDescriptor
    from piecework.runtime.batch.descriptor import BatchKind as BatchKind
    from piecework.runtime.batch.dispatcher import CudagraphDispatcher as CudagraphDispatcher
    from piecework.runtime.batch.forward_context import ForwardContext as ForwardContext
    from piecework.runtime.batch.forward_context import get_forward_context as get_forward_context
    from piecework.runtime.batch.forward_context import set_forward_context as set_forward_context
    from piecework.runtime.batch.mode import CUDAGraphMode as CUDAGraphMode
    from piecework.runtime.batch.ranges import Range as Range
    from piecework.runtime.compilers import CompilerInterface as CompilerInterface
    from piecework.runtime.compilers import EagerAdaptor as EagerAdaptor
    from piecework.runtime.compilers import InductorAdaptor as InductorAdaptor
    from piecework.runtime.compilers import InductorStandaloneAdaptor as InductorStandaloneAdaptor
    from piecework.runtime.compilers import make_compiler as make_compiler
    from piecework.runtime.compilers.passes import CallableInductorPass as CallableInductorPass
    from piecework.runtime.compilers.passes import InductorPass as InductorPass
    from piecework.runtime.compilers.passes import PostGradPassManager as PostGradPassManager
    from piecework.runtime.compilers.passes import pass_context as pass_context
    from piecework.runtime.config.compilation import CompilationConfig as CompilationConfig
    from piecework.runtime.config.compilation import CompilationMode as CompilationMode
    from piecework.runtime.config.compilation import DynamicShapesConfig as DynamicShapesConfig
    from piecework.runtime.config.compilation import PassConfig as PassConfig
    from piecework.runtime.config.compilation import RuntimeConfig as RuntimeConfig
    from piecework.runtime.config.compilation import StitchingConfig as StitchingConfig
    from piecework.runtime.config.groups import DynamicShapesType as DynamicShapesType
    from piecework.runtime.counters import CompilationCounter as CompilationCounter
    from piecework.runtime.decorators import ignore_torch_compile as ignore_torch_compile
    from piecework.runtime.decorators import stitched_of as stitched_of
    from piecework.runtime.decorators import support_torch_compile as support_torch_compile
    from piecework.runtime.graphs.device.contract import weak_ref_tensors as weak_ref_tensors
    from piecework.runtime.graphs.memory.wrapper import CUDAGraphEntry as CUDAGraphEntry
    from piecework.runtime.graphs.memory.wrapper import CUDAGraphOptions as CUDAGraphOptions
    from piecework.runtime.graphs.memory.wrapper import CUDAGraphWrapper as CUDAGraphWrapper
    from piecework.runtime.graphs.memory.wrapper import (
        wrap_with_cudagraph_if_needed as wrap_with_cudagraph_if_needed,
    )
    from piecework.runtime.graphs.plan.options import CaptureOptions as CaptureOptions
    from piecework.runtime.graphs.serve.lazy import ConcreteSizeEntry as ConcreteSizeEntry
    from piecework.runtime.graphs.serve.lazy import CUDAPiecewiseBackend as CUDAPiecewiseBackend
    from piecework.runtime.graphs.stage.inputs import InputSpec as InputSpec
    from piecework.runtime.graphs.stage.inputs import StaticInputs as StaticInputs
    from piecework.runtime.graphs.stage.inputs import make_copy_and_call as make_copy_and_call
    from piecework.runtime.model_tag import set_model_tag as set_model_tag
    from piecework.runtime.model_tag import (
        set_on_compilation_complete as set_on_compilation_complete,
    )
    from piecework.runtime.pieces.backend import PieceworkBackend as PieceworkBackend
    from piecework.runtime.pieces.backend import backend_of as backend_of
    from piecework.runtime.pieces.manager import CompilerManager as CompilerManager
    from piecework.runtime.pieces.manager import RangeEntry as RangeEntry
    from piecework.runtime.pieces.manager import create_concrete_args as create_concrete_args
    from piecework.runtime.pieces.manager import (
        get_fake_args_from_graph as get_fake_args_from_graph,
    )
    from piecework.runtime.pieces.piecewise import PiecewiseBackend as PiecewiseBackend
    from piecework.runtime.pieces.piecewise import (
        PiecewiseCompileInterpreter as PiecewiseCompileInterpreter,
    )
    from piecework.runtime.splitting_op import declare_full_graphs as declare_full_graphs
    from piecework.runtime.splitting_op import declare_rows as declare_rows
    from piecework.runtime.stitched import StitchedModule as StitchedModule
    from piecework.runtime.store.artifacts import (
        StandaloneCompiledArtifacts as StandaloneCompiledArtifacts,
    )

__all__, __getattr__, __dir__ = face(__name__, __file__)
