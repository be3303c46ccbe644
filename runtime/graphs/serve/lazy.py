"""One piece, decided per batch size as sizes come: general code, compiled, or captured."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch.fx

from piecework.codegen.graph.structure import input_signature, structure_of
from piecework.errors import InputError
from piecework.runtime.batch.descriptor import BatchDescriptor
from piecework.runtime.batch.forward_context import (
    ForwardContext,
    current_forward_context,
    override_forward_context,
)
from piecework.runtime.batch.mode import CUDAGraphMode
from piecework.runtime.batch.ranges import Range
from piecework.runtime.config.compilation import CompilationConfig
from piecework.runtime.graphs.device.contract import StaticGraph
from piecework.runtime.graphs.memory.owner import StaticGraphs
from piecework.runtime.graphs.memory.wrapper import (
    CUDAGraphEntry,
    CUDAGraphOptions,
    CUDAGraphWrapper,
)
from piecework.runtime.pieces.manager import Request
from piecework.runtime.pieces.piecewise import PieceCompiler

Code = Callable[..., object]


class ConcreteSizeEntry(CUDAGraphEntry):
    """One listed size: what is captured of it, and its code, the general one at first."""

    def __init__(
        self, runtime_shape: int, need_to_compile: bool, use_cudagraph: bool, runnable: Code
    ) -> None:
        super().__init__(BatchDescriptor(runtime_shape))
        self.runtime_shape, self.use_cudagraph = runtime_shape, use_cudagraph
        self.need_to_compile, self.compiled, self.runnable = need_to_compile, False, runnable

    @property
    def cudagraph(self) -> StaticGraph | None:
        return self.graph

    @property
    def input_addresses(self) -> tuple[int, ...] | None:
        return self.graph and tuple(s.placement.address for s in self.slots if s.placement)


class CUDAPiecewiseBackend(CUDAGraphWrapper):
    """The field's lazy policy of one piece: listed sizes are compiled and captured as they come.

    The first call runs the general graph, as do sizes that nobody listed. The batch size is the
    argument at the first of ``sym_shape_indices``.
    """

    def __init__(
        self,
        graph: torch.fx.GraphModule,
        config: CompilationConfig,
        graph_pool: StaticGraphs,
        piecewise_compile_index: int,
        total_piecewise_compiles: int,
        sym_shape_indices: Sequence[int],
        compiled_graph_for_general_shape: Code,
        backend: PieceCompiler | None = None,
    ) -> None:
        is_last = piecewise_compile_index == total_piecewise_compiles - 1
        options = CUDAGraphOptions(gc_disable=piecewise_compile_index > 0, weak_ref_output=is_last)
        name, mode = f"piece {piecewise_compile_index}", CUDAGraphMode.PIECEWISE
        super().__init__(self._run, config, mode, options, graph_pool, name)
        self.graph, self.backend, self.sym_shape_indices = graph, backend, sym_shape_indices
        self.compiled_graph_for_general_shape = compiled_graph_for_general_shape
        self.first_run_finished = False
        captures = config.cudagraph_mode.requires_piecewise_compilation()
        compiled = set(config.compile_sizes if backend is not None else ())
        captured = set((config.cudagraph_capture_sizes or ()) if captures else ())
        self.concrete_size_entries = {
            n: ConcreteSizeEntry(n, n in compiled, n in captured, compiled_graph_for_general_shape)
            for n in sorted(compiled | captured)
        }
        self.concrete_cudagraph_entries |= self._listed_entries()

    def _listed_entries(self) -> dict[BatchDescriptor, ConcreteSizeEntry]:
        return {each.batch_descriptor: each for each in self.concrete_size_entries.values()}

    def __call__(self, *args: object) -> object:  # type: ignore[override]
        entry = self._listed(args) if self.first_run_finished else None
        self.first_run_finished = True
        if entry is None:
            return self.compiled_graph_for_general_shape(*args)
        if self.backend is not None and entry.need_to_compile and not entry.compiled:
            entry.runnable, entry.compiled = self._compile(self.backend, entry.runtime_shape), True
        context = current_forward_context() or ForwardContext()
        if not entry.use_cudagraph or context.skip_cuda_graphs:
            return entry.runnable(*args)
        mode, shape = self.runtime_mode, entry.batch_descriptor
        captured = replace(context, cudagraph_runtime_mode=mode, batch_descriptor=shape)
        with override_forward_context(captured):
            return super().__call__(*args)

    def _run(self, *args: object) -> object:
        entry = self._listed(args)
        return (self.compiled_graph_for_general_shape if entry is None else entry.runnable)(*args)

    def _listed(self, args: Sequence[object]) -> ConcreteSizeEntry | None:
        if not self.sym_shape_indices:
            return None
        index = self.sym_shape_indices[0]
        size = args[index] if index < len(args) else None
        if not isinstance(size, int):
            why = f"argument {index} should be the batch size and is a {type(size).__name__}"
            hint = "pass sym_shape_indices as the piece's placeholders have them"
            raise InputError(why, where=self.name, hint=hint)
        return self.concrete_size_entries.get(size)

    def _compile(self, backend: PieceCompiler, size: int) -> Code:
        structure = structure_of(self.graph, describe_input=input_signature)
        only, symbol = Range(size, size), backend.batch_symbol
        request = Request(self.name, self.graph, structure, only, symbol)
        return backend.compiler_manager.compile(request).runnable

    def discard(self, mode: CUDAGraphMode, descriptor: BatchDescriptor) -> None:
        super().discard(mode, descriptor)
        self.concrete_cudagraph_entries |= self._listed_entries()
