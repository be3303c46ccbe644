"""One piece, decided per batch size as sizes come: in, calls; out, the general code, a compiled size, or a captured one.

It never compiles or captures a size that nobody listed; a `CUDAGraphWrapper` captures, the backend's manager compiles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

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
from piecework.runtime.graphs.memory.captured_call import CapturedCall
from piecework.runtime.graphs.memory.owner import StaticGraphs
from piecework.runtime.graphs.memory.wrapper import (
    CUDAGraphEntry,
    CUDAGraphOptions,
    CUDAGraphWrapper,
)
from piecework.runtime.pieces.piecewise import PieceCompiler, inputs_for


@dataclass(slots=True)
class ConcreteSizeEntry:
    """One listed size: its code (``runnable``, None before its first call), and what the wrapper knows of it."""

    runtime_shape: int
    need_to_compile: bool
    use_cudagraph: bool
    captured: CUDAGraphEntry
    compiled: bool = False
    runnable: Callable[..., object] | None = None

    @property
    def num_finished_warmup(self) -> int:
        return self.captured.num_finished_warmup

    @property
    def call(self) -> CapturedCall | None:
        return self.captured.call

    @property
    def cudagraph(self) -> StaticGraph | None:
        return None if self.call is None else self.call.graph

    @property
    def output(self) -> object:
        return self.captured.output

    @property
    def input_addresses(self) -> tuple[int, ...] | None:
        if self.call is None:
            return None
        return tuple(s.placement.address for s in self.call.slots if s.placement is not None)


class CUDAPiecewiseBackend(CUDAGraphWrapper):
    """The field's lazy policy of one piece (see docs/static-graphs.md for what captures a whole model).

    The first call, and any size that nobody listed, runs the general graph; a compile size is compiled at its first hit; a
    capture size warms up, is captured, and is replayed from then on, unless the forward context skips graphs. The batch size
    is the argument at the first of ``sym_shape_indices``; a piece without one runs its general graph.
    """

    def __init__(
        self,
        graph: torch.fx.GraphModule,
        config: CompilationConfig,
        graph_pool: StaticGraphs,
        piecewise_compile_index: int,
        total_piecewise_compiles: int,
        sym_shape_indices: Sequence[int],
        compiled_graph_for_general_shape: Callable[..., object],
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
            n: ConcreteSizeEntry(n, n in compiled, n in captured, self._entry(BatchDescriptor(n)))
            for n in sorted(compiled | captured)
        }

    def __call__(self, *args: object) -> object:  # type: ignore[override]
        entry = self._listed(args) if self.first_run_finished else None
        self.first_run_finished = True
        if entry is None:
            return self.compiled_graph_for_general_shape(*args)
        entry.runnable = entry.runnable or self._code_of(entry)
        context = current_forward_context() or ForwardContext()
        if not entry.use_cudagraph or context.skip_cuda_graphs:
            return entry.runnable(*args)
        shape = entry.captured.batch_descriptor
        with override_forward_context(
            replace(context, cudagraph_runtime_mode=self.runtime_mode, batch_descriptor=shape)
        ):
            return super().__call__(*args)

    def _run(self, *args: object) -> object:
        entry = self._listed(args)
        assert entry is not None and entry.runnable is not None
        return entry.runnable(*args)

    def _listed(self, args: Sequence[object]) -> ConcreteSizeEntry | None:
        if not self.sym_shape_indices:
            return None
        index = self.sym_shape_indices[0]
        size = args[index] if index < len(args) else None
        if not isinstance(size, int):
            raise InputError(
                f"argument {index} should be the batch size and is a {type(size).__name__}",
                where=self.name,
                hint="pass sym_shape_indices as the piece's placeholders have them",
            )
        return self.concrete_size_entries.get(size)

    def _code_of(self, entry: ConcreteSizeEntry) -> Callable[..., object]:
        if self.backend is None or not entry.need_to_compile:
            return self.compiled_graph_for_general_shape
        only = Range(entry.runtime_shape, entry.runtime_shape)
        entry.compiled = True
        return self.backend.compiler_manager.compile(
            self.graph,
            inputs_for(self.graph, only, self.backend.batch_symbol),
            only,
            structure=structure_of(self.graph, describe_input=input_signature),
            submod_name=self.name,
        ).runnable

    def discard(self, mode: CUDAGraphMode, descriptor: BatchDescriptor) -> None:
        super().discard(mode, descriptor)
        entry = self.concrete_size_entries.get(descriptor.num_tokens)
        if entry is not None and entry.captured.batch_descriptor == descriptor:
            entry.captured = self._entry(descriptor)
