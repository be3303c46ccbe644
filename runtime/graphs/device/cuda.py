"""Static graphs on a GPU: in, a callable and its inputs; out, a CUDA graph over one owner's private pool and stream.

It never patches torch or the garbage collector: it drives ``torch.cuda.CUDAGraph`` itself, so collecting is the caller's choice.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

from piecework.codegen.stitch.source import collector_paused
from piecework.errors import StaticGraphError
from piecework.runtime.graphs.device.contract import StaticGraph
from piecework.runtime.graphs.device.weak_ref import weak_ref_tensors


class CudaGraphPlatform:
    """Static graphs on one CUDA device.

    Raises:
        StaticGraphError: there is no such device.
    """

    def __init__(self, device: torch.device) -> None:
        if not torch.cuda.is_available():
            raise StaticGraphError(
                "CUDA is not available, so nothing can be captured on it",
                where=str(device),
                hint="use cudagraph_mode NONE, or capture on the CPU",
            )
        index = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device("cuda", index)

    def new_pool(self) -> CudaGraphPool:
        return CudaGraphPool(self.device)

    def new_graph(self, pool: CudaGraphPool) -> CudaStaticGraph:
        return CudaStaticGraph(pool)

    @contextmanager
    def capture_scope(self, pool: CudaGraphPool) -> Iterator[None]:
        with _on_stream(pool.stream):
            yield
        torch.cuda.synchronize(self.device)

    def release_cached_memory(self) -> None:
        torch.cuda.empty_cache()

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)


class CudaGraphPool:
    """A private memory pool with the one stream that all captures into it use.

    Blocks of the caching allocator belong to a stream, so captures share memory only on the same one. An empty
    graph belongs to the pool from the start: the allocator gives a pool up for good once its last graph is gone,
    and a failed or discarded first capture must not end it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with torch.cuda.device(device):
            self.stream = torch.cuda.Stream(device)
        self._measured = 0
        self._open()

    def _open(self) -> None:
        with torch.cuda.device(self.device):
            self.handle = torch.cuda.graph_pool_handle()
        self._anchor = torch.cuda.CUDAGraph()
        with _on_stream(self.stream), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*CUDA Graph is empty.*")
            self._anchor.capture_begin(pool=self.handle, capture_error_mode="thread_local")
            self._anchor.capture_end()

    @property
    def nbytes(self) -> int:
        """What the captures so far took from the device, graphs and driver memory included."""
        return self._measured

    def clear(self) -> None:
        self._anchor.reset()
        with torch.cuda.device(self.device):
            torch.cuda.empty_cache()
        self._measured = 0
        self._open()

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Add what the block takes from the device's free memory."""
        before, _ = torch.cuda.mem_get_info(self.device)
        try:
            yield
        finally:
            after, _ = torch.cuda.mem_get_info(self.device)
            self._measured += max(0, before - after)


class CudaStaticGraph(StaticGraph[CudaGraphPool, "torch.cuda.CUDAGraph"]):
    """One ``torch.cuda.CUDAGraph``."""

    def _record(
        self,
        runnable: Callable[..., object],
        args: tuple[object, ...],
        kwargs: Mapping[str, object],
        weak: bool,
    ) -> tuple[torch.cuda.CUDAGraph, object]:
        if torch.cuda.is_current_stream_capturing():
            raise StaticGraphError(
                "a CUDA graph is being captured already", hint="captures can't be nested"
            )
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self._pool.device)
        with (
            self._pool.measured(),
            _on_stream(self._pool.stream),
            torch.no_grad(),
            collector_paused(),  # what it destroys may call CUDA in ways a capture forbids
        ):
            # Other threads may allocate meanwhile; only what this thread does is held to the capture's rules.
            graph.capture_begin(pool=self._pool.handle, capture_error_mode="thread_local")
            try:
                output = runnable(*args, **kwargs)
                output = weak_ref_tensors(output) if weak else output
            except BaseException:
                _abandon(graph)
                raise
            graph.capture_end()
        return graph, output

    def replay(self) -> None:
        self.require_captured().replay()

    def replay_function(self) -> Callable[[], None]:
        # The base class's method is the driver call itself; the Python one only adds debugging.
        return super(torch.cuda.CUDAGraph, self.require_captured()).replay

    def reset(self) -> None:
        if self._held is not None:
            self._held.reset()
        super().reset()


@contextmanager
def _on_stream(stream: torch.cuda.Stream) -> Iterator[None]:
    """Run the block on ``stream``, ordered after what was queued before and before what is queued after."""
    outer = torch.cuda.current_stream(stream.device)
    if outer == stream:
        yield
        return
    stream.wait_stream(outer)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        outer.wait_stream(stream)


def _abandon(graph: torch.cuda.CUDAGraph) -> None:
    """End a capture whose callable failed; the stream must leave capture mode, the error to report is the first one."""
    with contextlib.suppress(RuntimeError):
        graph.capture_end()
    with contextlib.suppress(RuntimeError):
        graph.reset()
