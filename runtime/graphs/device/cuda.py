"""Static graphs on a GPU: ``torch.cuda.CUDAGraph`` over one owner's private pool and stream."""

from __future__ import annotations

import contextvars
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from types import MappingProxyType

import torch

from piecework.collector import collector_paused
from piecework.errors import StaticGraphError
from piecework.runtime import torch_compat
from piecework.runtime.graphs.device.contract import (
    Args,
    GraphPlatform,
    Kwargs,
    Run,
    StaticGraph,
    weak_ref_tensors,
)
from piecework.scope import set_for

# torch takes one capture in a process, and who waits for a device meanwhile makes it invalid.
_TURN = threading.RLock()
# What kernels are captured for: they carry its name, layer and line.
_STATEMENT: contextvars.ContextVar[Mapping[str, object]] = contextvars.ContextVar(
    "statement", default=MappingProxyType({})
)


@contextmanager
def kernels_of(what: str, layer: str, line: int, graph: str) -> Iterator[None]:
    """Mark what is captured in the block as the work of one statement of a module ``layer``."""
    # Inside a statement that calls a shared function, that statement's layer counts.
    layer = str(_STATEMENT.get().get("layer") or layer)
    name = f"{what} {layer}".strip()
    statement = {"name": name, "layer": layer, "line": line, "graph": graph}
    with set_for(_STATEMENT, statement), torch_compat.mark_kernels(statement):
        yield


class CudaGraphPlatform(GraphPlatform):
    """Static graphs on one CUDA device, whose allocator must have private pools."""

    def __init__(self, device: torch.device) -> None:
        if not torch.cuda.is_available():
            why = "CUDA is not available, so nothing can be captured on it"
            hint = "use cudagraph_mode NONE, or capture on the CPU"
            raise StaticGraphError(why, where=str(device), hint=hint)
        backend = torch.cuda.get_allocator_backend()
        if backend != "native":
            why = f"torch's allocator is {backend}, whose freed memory becomes a part of the graph"
            hint = "leave backend:cudaMallocAsync out of PYTORCH_ALLOC_CONF"
            raise StaticGraphError(why, where=str(device), hint=hint)
        index = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device("cuda", index)

    def new_pool(self) -> CudaGraphPool:
        return CudaGraphPool(self.device)

    def new_graph(self, pool: CudaGraphPool, *, marked: bool = False) -> CudaStaticGraph:
        return CudaStaticGraph(pool, marked=marked)

    @property
    def unmarked(self) -> str:  # type: ignore[override]
        return torch_compat.why_kernels_unmarked()

    def is_capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def call_order(self) -> Callable[[], None]:
        return _CallOrder(self.device)

    def release_cached_memory(self) -> None:
        with _TURN:
            torch.cuda.empty_cache()

    def synchronize(self) -> None:
        with _TURN:
            torch.cuda.synchronize(self.device)


class _CallOrder:
    """Lets a call wait for the one before, queued on another stream: both use the same memory."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._lock = device, threading.Lock()
        self._number: int | None = None
        self._stream: torch.cuda.Stream | None = None

    def __call__(self) -> None:
        number = torch_compat.stream_number(self._device)
        with self._lock:
            if number == self._number:
                return
            stream = torch.cuda.current_stream(self._device)
            if self._stream is not None:
                stream.wait_stream(self._stream)
            self._number, self._stream = number, stream


class CudaGraphPool:
    """A private memory pool with one stream, which only captures into it use."""

    # cuBLAS's workspace of that stream so lies in the pool, where nobody frees it under the graphs.
    # An empty graph keeps the pool: the allocator gives it up once its last graph is gone.

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._abandoned_bytes = self._segment_bytes = self._driver_bytes = 0
        self._open()

    def _open(self) -> None:
        # New memory has a new stream, since the workspace of the old one lies in the old memory.
        self.stream = torch_compat.own_stream(self.device)
        with torch.cuda.device(self.device):
            self.handle = torch.cuda.graph_pool_handle()
        self._anchor = torch.cuda.CUDAGraph()
        with _TURN, _on_stream(self.stream), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*CUDA Graph is empty.*")
            self._anchor.capture_begin(pool=self.handle, capture_error_mode="thread_local")
            self._anchor.capture_end()
        self._is_own, self._probe = False, None

    def probe(self) -> None:
        """Take a little memory inside the first capture, for ``require_own``."""
        if not self._is_own:
            self._probe = int(torch.cuda.caching_allocator_alloc(512, self.device, self.stream))

    def require_own(self) -> None:
        """Refuse where a capture takes its memory from another pool, which gives it to others."""
        if self._probe is not None:
            if not any(at <= self._probe < at + nbytes for at, nbytes in self._segments()):
                raise StaticGraphError(
                    "the memory of captures would lie in another pool, which gives it to others "
                    "while graphs use it",
                    where=str(self.device),
                    hint="capture outside of torch.cuda.use_mem_pool",
                )
            self._drop_probe()
        self._is_own = True

    def _drop_probe(self) -> None:
        probe, self._probe = self._probe, None
        if probe is not None:
            torch.cuda.caching_allocator_delete(probe)

    def _segments(self) -> list[tuple[int, int]]:
        """Address and bytes of what torch's allocator took from the device for this pool."""
        found = torch.cuda.memory_snapshot(self.handle, include_traces=False)
        here = [each for each in found if each["device"] == self.device.index]
        return [(each["address"], each["total_size"]) for each in here]

    @property
    def nbytes(self) -> int:
        """What the captures so far took from the device, graphs included."""
        return self._abandoned_bytes + self._segment_bytes + self.driver_bytes

    @property
    def driver_bytes(self) -> int:
        """Of these, what the driver took for graphs, which the device tells in coarse steps."""
        return max(0, self._driver_bytes)

    def clear(self) -> None:
        self._anchor.reset()
        with _TURN, torch.cuda.device(self.device):
            torch.cuda.empty_cache()
        self._abandoned_bytes = self._segment_bytes = self._driver_bytes = 0
        self._open()

    def abandon(self, graph: torch.cuda.CUDAGraph, *, begun: bool) -> None:
        """End a failed capture, go on in new memory, and tell torch's generators it is over."""
        with torch.cuda.stream(self.stream):  # what failed may have left another one
            torch_compat.abandon_capture(graph, self.device, self.handle, begun=begun)
        self._drop_probe()
        self._anchor.reset()
        self._abandoned_bytes += self._segment_bytes
        self._segment_bytes = 0
        self._open()

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Count what the block takes, if it succeeds."""
        before = self._beside_torch()
        yield
        self._driver_bytes += self._beside_torch() - before
        self._segment_bytes = sum(nbytes for _, nbytes in self._segments())

    def _beside_torch(self) -> int:
        """What is taken of the device by others than torch's allocator."""
        free, total = torch.cuda.mem_get_info(self.device)
        return int(total - free - torch.cuda.memory_reserved(self.device))


class CudaStaticGraph(StaticGraph):
    """One ``torch.cuda.CUDAGraph``; ``marked``: its kernels carry their statement in traces."""

    def __init__(self, pool: CudaGraphPool, *, marked: bool = False) -> None:
        super().__init__(pool)
        self._marked = marked

    def _record(
        self, runnable: Run, args: Args, kwargs: Kwargs, weak: bool
    ) -> tuple[torch.cuda.CUDAGraph, object]:
        graph, begun = torch.cuda.CUDAGraph(), False
        with (
            _alone_on(self._pool.device),
            self._pool.measured(),
            _on_stream(self._pool.stream),
            torch.no_grad(),
            collector_paused(),  # what it destroys may call CUDA in ways a capture forbids
        ):
            try:
                with torch_compat.kernels_marked(graph) if self._marked else nullcontext():
                    # Other threads may allocate meanwhile: the rules are for this thread alone.
                    graph.capture_begin(pool=self._pool.handle, capture_error_mode="thread_local")
                    begun = True
                    self._pool.probe()
                    with torch_compat.mark_kernels(_STATEMENT.get()):
                        output = runnable(*args, **kwargs)
                    output = weak_ref_tensors(output) if weak else output
                    graph.capture_end()
                self._pool.require_own()
            except BaseException as error:
                try:
                    self._pool.abandon(graph, begun=begun)
                except RuntimeError as second:
                    # The device is lost; what lost it is the error to report.
                    error.add_note(f"After that, nothing can be captured on the device: {second}")
                raise
        return graph, output

    def replay_function(self) -> Callable[[], None]:
        # The base class's method is the driver call itself; the Python one only adds debugging.
        return super(torch.cuda.CUDAGraph, self.require_captured()).replay

    def reset(self) -> None:
        if self._held is not None:
            self._held.reset()
        super().reset()


@contextmanager
def _alone_on(device: torch.device) -> Iterator[None]:
    """Run the block when nobody else captures or waits here, and ``device`` has nothing to do."""
    with _TURN:
        if torch.cuda.is_current_stream_capturing():
            raise StaticGraphError(
                "a CUDA graph is being captured already", hint="captures can't be nested"
            )
        torch.cuda.synchronize(device)
        yield


@contextmanager
def _on_stream(stream: torch.cuda.Stream) -> Iterator[None]:
    """Run the block on ``stream``, after what was queued before and before what comes after."""
    outer = torch.cuda.current_stream(stream.device)
    if outer == stream:
        yield
        return
    stream.wait_stream(outer)
    try:
        with torch.cuda.stream(stream):
            yield
    except BaseException as error:
        try:
            outer.wait_stream(stream)
        except RuntimeError as second:
            # The device is lost; what lost it is the error to report.
            error.add_note(f"After that, streams can't be joined: {second}")
        raise
    outer.wait_stream(stream)
