"""One piece, decided per batch size as sizes come: in, calls; out, the general code, a compiled size, or a captured one.

It never compiles or captures a size that nobody listed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch.fx

from piecework.errors import InputError
from piecework.runtime.batch.descriptor import BatchDescriptor
from piecework.runtime.batch.forward_context import current_forward_context
from piecework.runtime.batch.mode import CUDAGraphMode
from piecework.runtime.graphs.device.contract import StaticGraph
from piecework.runtime.graphs.memory.captured_call import CapturedCall, CaptureRequest
from piecework.runtime.graphs.memory.owner import GraphHolder, StaticGraphs

Runnable = Callable[..., object]

# Stands for the size of a piece that does not depend on it.
_ANY = 0


class LazySettings(Protocol):
    """What the lazy policy reads of a resolved compilation configuration."""

    @property
    def compile_sizes(self) -> Iterable[int]: ...

    @property
    def cudagraph_capture_sizes(self) -> Iterable[int] | None: ...

    @property
    def cudagraph_num_of_warmups(self) -> int: ...

    @property
    def cudagraph_mode(self) -> CUDAGraphMode: ...


class SizeCompiler(Protocol):
    """Who compiles a piece for one size."""

    def compile_for_size(
        self, graph: torch.fx.GraphModule, args: tuple[object, ...], size: int, index: int
    ) -> Runnable:
        """A callable like ``graph`` for batches of exactly ``size``."""
        ...

    def all_sizes_compiled(self, index: int) -> None:
        """Piece ``index`` has nothing left to compile."""
        ...


@dataclass(slots=True)
class ConcreteSizeEntry:
    """What is known about one listed size.

    Attributes:
        runtime_shape: the size.
        need_to_compile: it is a compile size.
        use_cudagraph: it is a capture size.
        compiled: it has been compiled.
        runnable: what runs it uncaptured.
        num_finished_warmup: warm-up runs so far.
        call: the capture.
        kept: the output of a graph that serves every size, kept so that no other graph is given its memory.
    """

    runtime_shape: int
    need_to_compile: bool
    use_cudagraph: bool
    compiled: bool = False
    runnable: Runnable | None = None
    num_finished_warmup: int = 0
    call: CapturedCall | None = None
    kept: object = None

    @property
    def cudagraph(self) -> StaticGraph | None:
        return None if self.call is None else self.call.graph

    @property
    def output(self) -> object:
        """The static output, weakly referenced; None before the capture."""
        return None if self.call is None else self.call.output

    @property
    def input_addresses(self) -> tuple[int, ...] | None:
        """Where the captured tensors are, in the order of the arguments' leaves."""
        if self.call is None:
            return None
        placements = (slot.placement for slot in self.call.slots)
        return tuple(placement.address for placement in placements if placement is not None)


class CUDAPiecewiseBackend(GraphHolder):
    """The lazy per-size policy of one piece.

    The first call runs the general graph. Afterwards a size nobody listed runs the general graph; a compile
    size is compiled on its first hit; a capture size warms up, is captured, and is replayed from then on.
    ``skip_cuda_graphs`` in the forward context bypasses capture and replay.

    Args:
        graph: the piece.
        config: sizes, warm-ups and mode.
        graph_pool: who owns the graphs and says when capturing is allowed (lazily, for a real lazy start).
        piecewise_compile_index: the piece's number among those compiled.
        total_piecewise_compiles: how many there are; the last one lets go of its output inside its capture.
        sym_shape_indices: which arguments are the batch size; the first is read. Without any the piece does not depend on
            it: there is nothing to compile for a size, and if any size is to be captured, one graph serves all of them.
        compiled_graph_for_general_shape: what runs any size.
        backend: compiles single sizes.
        name: what errors and reports call the piece.
        mutated_args: leaves of the arguments that the piece changes in place.
    """

    def __init__(
        self,
        graph: torch.fx.GraphModule,
        config: LazySettings,
        graph_pool: StaticGraphs,
        piecewise_compile_index: int,
        total_piecewise_compiles: int,
        sym_shape_indices: list[int],
        compiled_graph_for_general_shape: Runnable,
        backend: SizeCompiler | None = None,
        *,
        name: str | None = None,
        mutated_args: frozenset[int] = frozenset(),
    ) -> None:
        self.graph = graph
        self.graphs = graph_pool
        self.piecewise_compile_index = piecewise_compile_index
        self.is_first_graph = piecewise_compile_index == 0
        self.is_last_graph = piecewise_compile_index == total_piecewise_compiles - 1
        self.sym_shape_indices = sym_shape_indices
        self.compiled_graph_for_general_shape = compiled_graph_for_general_shape
        self.backend = backend
        self.name = f"piece {piecewise_compile_index}" if name is None else name
        self.mutated_args = mutated_args
        self.num_warmups = config.cudagraph_num_of_warmups
        self.first_run_finished = False
        captures = config.cudagraph_mode.requires_piecewise_compilation()
        compile_sizes = frozenset(config.compile_sizes) if backend is not None else frozenset()
        capture_sizes = frozenset((config.cudagraph_capture_sizes or ()) if captures else ())
        if not sym_shape_indices:
            compile_sizes, capture_sizes = frozenset(), frozenset({_ANY} if capture_sizes else ())
        self.concrete_size_entries = {
            size: ConcreteSizeEntry(size, size in compile_sizes, size in capture_sizes)
            for size in sorted(compile_sizes | capture_sizes)
        }
        # Pieces that serve all sizes share no forward that captures them, so each has a descriptor of its own.
        self._any = BatchDescriptor(_ANY, extra=(("piece", piecewise_compile_index),))
        self.to_be_compiled_sizes = set(compile_sizes)
        graph_pool.register(self)

    def __call__(self, *args: object) -> object:
        if not self.first_run_finished:
            self.first_run_finished = True
            self._report_if_all_compiled()
            return self.compiled_graph_for_general_shape(*args)
        entry = self._entry(args)
        if entry is None:
            return self.compiled_graph_for_general_shape(*args)
        runnable = entry.runnable
        if runnable is None:
            runnable = entry.runnable = self._runnable_for(entry, args)
        context = current_forward_context()
        if not entry.use_cudagraph or (context is not None and context.skip_cuda_graphs):
            return runnable(*args)
        call = entry.call
        if call is None:
            return self._warm_up_or_capture(entry, runnable, args)
        if call.trusted:
            call.replay()
            return call.output
        return call(runnable, args, {})

    def _entry(self, args: tuple[object, ...]) -> ConcreteSizeEntry | None:
        if not self.sym_shape_indices:
            return self.concrete_size_entries.get(_ANY)
        index = self.sym_shape_indices[0]
        size = args[index] if index < len(args) else None
        if not isinstance(size, int):
            raise InputError(
                f"argument {index} should be the batch size and is a {type(size).__name__}",
                where=self.name,
                hint="pass sym_shape_indices as the piece's placeholders have them",
            )
        return self.concrete_size_entries.get(size)

    def _runnable_for(self, entry: ConcreteSizeEntry, args: tuple[object, ...]) -> Runnable:
        if not entry.need_to_compile or self.backend is None:
            return self.compiled_graph_for_general_shape
        compiled = self.backend.compile_for_size(
            self.graph, args, entry.runtime_shape, self.piecewise_compile_index
        )
        entry.compiled = True
        self.to_be_compiled_sizes.discard(entry.runtime_shape)
        self._report_if_all_compiled()
        return compiled

    def _report_if_all_compiled(self) -> None:
        if self.backend is not None and not self.to_be_compiled_sizes:
            self.backend.all_sizes_compiled(self.piecewise_compile_index)

    def _warm_up_or_capture(
        self, entry: ConcreteSizeEntry, runnable: Runnable, args: tuple[object, ...]
    ) -> object:
        if entry.num_finished_warmup < self.num_warmups:
            entry.num_finished_warmup += 1
            return runnable(*args)
        request = CaptureRequest(
            self.name,
            CUDAGraphMode.PIECEWISE,
            self._descriptor(entry.runtime_shape),
            collect_garbage=self.is_first_graph,
            weak_output=self.is_last_graph and entry.runtime_shape != _ANY,
            mutated_args=self.mutated_args,
        )
        entry.call, output = CapturedCall.make(runnable, args, {}, request, self.graphs)
        if entry.runtime_shape == _ANY:
            entry.kept = output
        return output

    def discard(self, mode: CUDAGraphMode, descriptor: BatchDescriptor) -> None:
        if mode is not CUDAGraphMode.PIECEWISE or descriptor != self._descriptor(
            descriptor.num_tokens
        ):
            return
        entry = self.concrete_size_entries.get(descriptor.num_tokens)
        if entry is not None and entry.call is not None:
            entry.call.reset()
            entry.call = entry.kept = None

    def clear_graphs(self) -> None:
        for size in self.concrete_size_entries:
            self.discard(CUDAGraphMode.PIECEWISE, self._descriptor(size))

    def _descriptor(self, size: int) -> BatchDescriptor:
        return self._any if size == _ANY else BatchDescriptor(size)
