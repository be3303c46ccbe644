"""The rules of CUDA graphs in torch, kept without a GPU: what ``torch.cuda`` and the allocator do, function by function.

Streams of a small set are handed out in turn and know of each other's work what they waited for; a pool
records until it is told to stop; some operations make a capture invalid; a device may be lost.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from piecework.runtime import torch_compat
from piecework.runtime.graphs.device.cuda import CudaGraphPlatform
from piecework.runtime.graphs.memory import owner

LOST = "CUDA error: an illegal memory access was encountered"
INVALID = "CUDA error: operation failed due to a previous error during capture"
NO_MEMORY = "CUDA error: out of memory"
FORBIDDEN = "CUDA error: operation not permitted when stream is capturing"
_PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)
_LAUNCH_NOTHING = ("aten::set_", "aten::empty", "aten::detach", "aten::view", "aten::as_strided")
_NOT_TOGETHER = ("uint16", "uint32", "uint64", "complex32", "float8_e8m0fnu", "float4_e2m1fn_x2")
_TOTAL = 1 << 40
# A segment of the allocator's, what a graph takes of the driver, and the steps in which the device tells what is free.
SEGMENT, GRAPH, STEP = 512, 3000, 36000


def copy_each(targets: list[torch.Tensor], sources: list[torch.Tensor], waits: bool) -> None:
    """``torch._foreach_copy_`` as libtorch_cuda of 2.11 and of 2.15 has it: compiled for sixteen dtypes."""
    dtype = str(targets[0].dtype).removeprefix("torch.")
    if dtype in _NOT_TOGETHER:
        raise NotImplementedError(f'"foreach_tensor_copy" not implemented for {dtype!r}')
    torch._foreach_copy_(targets, sources, waits)


class FakeStream:
    """A stream, and how many replays of each stream come before what is queued here next."""

    def __init__(self, cuda: FakeCuda, number: int) -> None:
        self.cuda, self.number, self.device = cuda, number, torch.device("cuda", 0)
        self.cuda_stream = number
        self.before: Counter[int] = Counter()

    def wait_stream(self, other: FakeStream) -> None:
        self.cuda.require_alive()
        self.before |= other.before


class Watch(TorchDispatchMode):
    """Sees every operation: where its workspace is, whether it is forbidden, and what a replay has to do again."""

    def __init__(self, cuda: FakeCuda, graph: Driver | None = None) -> None:
        super().__init__()
        self.cuda, self.graph = cuda, graph

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in _PRODUCTS:
            self.cuda.take_workspace()
        if func is torch.ops.aten._local_scalar_dense.default:
            self.cuda.synchronize()
        if self.graph is None:
            return func(*args, **(kwargs or {}))
        return self.graph.record(func, args, kwargs or {})


class Driver:
    """``torch._C._CUDAGraph``."""

    cuda: FakeCuda

    def __init__(self, keep_graph: bool = False) -> None:
        self.ended, self.pool_id, self.stream = False, None, None
        self.number = self.cuda.next_id()
        self.work: list[tuple] = []
        self.nbytes = 0
        self.kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.invalid = self.allocated = self.routed = False

    def capture_begin(self, pool, capture_error_mode="global") -> None:
        cuda = self.cuda
        cuda.require_alive()
        cuda.generator_captures = True
        if cuda.current is cuda.default:
            raise RuntimeError("CUDA graphs must be captured on a non-default stream.")
        self.pool_id, self.stream, self.mode = pool, cuda.current, capture_error_mode
        cuda.begin_allocate(pool, self)
        self.allocated = self.routed = True
        if cuda.capturing is not None:
            cuda.capturing.invalid = True
            raise RuntimeError(FORBIDDEN)
        cuda.capturing = self
        self.watch = Watch(cuda, self)
        self.watch.__enter__()

    def record(self, func, args, kwargs):
        if func._schema.name.startswith(_LAUNCH_NOTHING):
            return func(*args, **kwargs)
        own = {id(out) for *_, outs in self.work for out in outs}
        for each, argument in zip(args, func._schema.arguments, strict=False):
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and isinstance(each, torch.Tensor) and id(each) not in own:
                self.kept.append((each, each.clone()))  # a capture computes nothing
        result = func(*args, **kwargs)
        outs = [t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
        self.work.append((func, args, kwargs, outs))
        self.nbytes += sum(t.untyped_storage().nbytes() for t in outs if not t._is_view())
        return result

    def capture_end(self) -> None:
        cuda = self.cuda
        if cuda.capturing is not self or cuda.current is not self.stream:
            raise RuntimeError("Capture must end on the same stream it began on.")
        self.watch.__exit__(None, None, None)
        cuda.capturing = None
        if self.invalid and cuda.like == "2.11":
            raise RuntimeError(INVALID)  # before the allocator is told, as AT_CUDA_CHECK does
        self.end_routing()
        if self.invalid:
            raise RuntimeError(INVALID)
        cuda.generator_captures = False
        for tensor, before in reversed(self.kept):
            tensor.copy_(before)
        for func, *_, outs in self.work:
            for out in outs:
                if not func._schema.is_mutable and out.is_floating_point() and not out._is_view():
                    out.fill_(float("nan"))
        self.ended = True
        cuda.take(self.pool_id, self.nbytes)
        cuda.driver += GRAPH
        if cuda.cannot_instantiate:
            cuda.cannot_instantiate = False
            raise RuntimeError(NO_MEMORY)

    def pool(self) -> object:
        if not self.ended:
            raise RuntimeError("Called CUDAGraph::pool() without a preceding successful capture.")
        return self.pool_id

    def end_routing(self) -> None:
        self.cuda.end_allocate(0, self.pool_id)
        self.cuda.pinned_recording.pop(self.pool_id)
        self.routed = False

    def replay(self) -> None:
        self.cuda.require_alive()
        if not self.ended:
            raise RuntimeError("Called CUDAGraph::replay without a preceding successful capture.")
        if self.cuda.capturing is not None:
            self.cuda.capturing.invalid = True
            raise RuntimeError(FORBIDDEN)
        self.cuda.count_replay()
        for func, args, kwargs, outs in self.work:
            again = torch.utils._pytree.tree_leaves(func(*args, **kwargs))
            for out, now in zip(
                outs, [t for t in again if isinstance(t, torch.Tensor)], strict=True
            ):
                if out.data_ptr() != now.data_ptr():
                    out.copy_(now)

    def reset(self) -> None:
        if self.cuda.newer and self.allocated and self.routed:
            self.end_routing()
        if self.cuda.newer and self.allocated:
            self.cuda.workspaces.pop(self.stream, None)
        if self.allocated if self.cuda.newer else self.ended:
            self.cuda.release(0, self.pool_id)
            self.allocated = False
        if self.ended:
            self.cuda.driver -= GRAPH
            self.ended = False
        self.work = []

    def __del__(self) -> None:
        self.reset()


class NewerGraph(Driver):
    """``torch.cuda.CUDAGraph`` of torch 2.15, which calls hooks and gives marks the ids of what is replayed."""

    def __init__(self, keep_graph: bool = False) -> None:
        super().__init__(keep_graph)
        self._capture_graph_id: int | None = None
        self._recorded_exec_ids: set[int] = set()
        self.exec_id: int | None = None
        self.started: list[Callable] = []
        self.over: list[Callable] = []

    @property
    def _has_graph_exec(self) -> bool:
        return self.ended

    def register_capture_start_hook(self, hook: Callable) -> None:
        self.started.append(hook)

    def register_capture_end_hook(self, hook: Callable) -> None:
        self.over.append(hook)

    def capture_begin(self, pool, capture_error_mode="global") -> None:
        super().capture_begin(pool, capture_error_mode)
        for hook in self.started:
            hook(self)

    def capture_end(self) -> None:
        self.capture_end_pre()

    def capture_end_pre(self) -> None:
        super().capture_end()
        self.ended = False
        for hook in self.over:
            hook(self)
        self.ended = True
        self.exec_id = self.cuda.next_id()
        recorded = self.cuda.recorder.kept
        if self._capture_graph_id is not None and self._capture_graph_id in recorded:
            recorded[self.exec_id] = recorded.pop(self._capture_graph_id)
            self._recorded_exec_ids.add(self.exec_id)

    def reset(self) -> None:
        for each in self._recorded_exec_ids:
            self.cuda.recorder.kept.pop(each, None)
        self._recorded_exec_ids, self._capture_graph_id = set(), None
        super().reset()


class FakeRecorder:
    """``torch.cuda._graph_annotations`` of torch 2.15: marks on what captures record."""

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda
        self.enabled = False  # ``mark_kernels`` does something
        self.unable: bool | Exception = False  # what it stands on is missing, or asking raises
        self.pending: list[tuple[dict, int, list[int]]] = []  # marks and nodes of ended blocks
        self.kept: dict[int, dict[int, dict]] = {}  # id of a graph → its nodes' marks

    def _set_annotations_enabled(self, enabled: bool) -> None:
        self.enabled = enabled

    def _set_annotation_backend(self, backend: str) -> None:
        assert backend in ("edge_walk", "cupti")

    def _set_annotation_key_by(self, key_by: str) -> None:
        assert key_by in ("exec", "source")

    def is_available(self) -> bool:
        if isinstance(self.unable, Exception):
            raise self.unable
        return torch.cuda.is_available() and not self.unable

    def maybe_stamp_capture_root(self, torch_cuda_graph: NewerGraph) -> None:
        if not self.enabled or self.unable or self.captured_here() is None:
            return
        torch_cuda_graph._capture_graph_id = torch_cuda_graph.number
        torch_cuda_graph._recorded_exec_ids.add(torch_cuda_graph.number)

    def captured_here(self) -> Driver | None:
        graph = self.cuda.capturing
        return graph if graph is not None and graph.stream is self.cuda.current else None

    @contextmanager
    def mark_kernels(self, annotation: str | dict, *, backward: bool = True) -> Iterator[None]:
        graph = self.captured_here()
        if not self.enabled or self.unable or graph is None:
            yield
            return
        first = len(graph.work)
        yield
        nodes = list(range(first, len(graph.work)))
        self.pending.append((annotation, graph.number, nodes))

    def resolve_pending_annotations(self) -> None:
        for annotation, graph, nodes in self.pending:
            for node in nodes:
                known = self.kept.setdefault(graph, {}).setdefault(node, {})
                known.update({k: v for k, v in annotation.items() if k not in known})
        self.pending.clear()

    def take_body_graph_ids(self) -> set[int]:
        return set()

    def discard_capture_annotations(self, torch_cuda_graph: NewerGraph) -> None:
        self.pending.clear()
        if not torch_cuda_graph._has_graph_exec:
            for each in torch_cuda_graph._recorded_exec_ids:
                self.kept.pop(each, None)

    def get_kernel_annotations(self) -> dict[int, list]:
        return {g << 32 | n: [told] for g, nodes in self.kept.items() for n, told in nodes.items()}


class FakeCuda:
    """What torch keeps per process and device; captures end as in the torch that it is ``like``.

    2.11 tells its allocators of captures that were valid; 2.13 of all, and keeps its reference to the
    pool of an invalid one; 2.15 gives that back too, and can mark kernels.
    """

    def __init__(self, like: str = "2.11") -> None:
        self.like, self.newer = like, like == "2.15"
        self.lost = False  # an error ended the use of the device
        self.cannot_instantiate = False  # the next capture is valid, and no graph can be made of it
        self.default = self.current = FakeStream(self, 0)
        self.streams = [FakeStream(self, number) for number in range(1, 5)]
        self.own: list[FakeStream] = []  # that torch does not hand out
        self.handed_out = self.handles = self.ids = self.replays = 0
        self.references: dict[object, int] = {}  # pool → graphs that use it
        self.held: set[object] = set()  # pools with memory of the device
        self.users_pool: object = None  # of ``use_mem_pool``: before that of a capture inside it
        self.segments: dict[object, list[int]] = {}  # pool → addresses taken from the device
        self.taken: dict[object, int] = {}  # pool → bytes that were allocated there
        self.driver = 0  # bytes that the driver took for graphs
        self.probes: set[int] = set()  # addresses that were allocated by hand
        self.recording: set[object] = set()  # pools that the allocator records to
        # Pools that the allocator of pinned memory records to, which asks the graph.
        self.pinned_recording: dict[object, weakref.ref[Driver]] = {}
        # Stream → the pool where cuBLAS's workspace for it is; None for ordinary memory.
        self.workspaces: dict[FakeStream, object] = {}
        self.capturing: Driver | None = None
        self.generator_captures = False  # the random generators take it that a capture goes on
        self.recorder = FakeRecorder(self)  # marks on kernels, where it is newer

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        values: dict[str, object] = {
            "is_available": lambda: True,
            "current_device": lambda: 0,
            "device": lambda device: nullcontext(),
            "Stream": lambda device: self.next_stream(),
            "current_stream": lambda device=None: self.current,
            "stream": self.on,
            "synchronize": lambda device=None: self.synchronize(),
            "empty_cache": self.empty_cache,
            "caching_allocator_alloc": self.allocate,
            "caching_allocator_delete": self.probes.remove,
            "memory_snapshot": self.snapshot,
            "memory_reserved": lambda device=None: self.reserved(),
            "mem_get_info": lambda device=None: self.mem_get_info(),
            "graph_pool_handle": self.next_handle,
            "CUDAGraph": self.graph_class(),
            "is_current_stream_capturing": lambda: self.capturing is not None,
            "get_allocator_backend": lambda: "native",
        }
        for name, value in values.items():
            monkeypatch.setattr(torch.cuda, name, value)
        self.install_recorder(monkeypatch)
        monkeypatch.setattr(torch_compat, "copy_each", copy_each)
        monkeypatch.setattr(torch_compat, "own_stream", lambda device: self.own_stream())
        # Tensors lie on the CPU here.
        platform = CudaGraphPlatform(torch.device("cuda", 0))
        monkeypatch.setattr(CudaGraphPlatform, "computes_on", lambda self, device: True)
        monkeypatch.setattr(owner, "platform_for", lambda device: platform)
        private: dict[str, Callable[..., object]] = {
            "_cuda_endAllocateToPool": self.end_allocate,
            "_cuda_releasePool": self.release,
            "_cuda_clearCublasWorkspaces": self.workspaces.clear,
            "_cuda_getCurrentRawStream": lambda index: self.current.number,
        }
        for name, function in private.items():
            monkeypatch.setattr(torch._C, name, function, raising=False)

    def next_stream(self) -> FakeStream:
        self.handed_out += 1
        return self.streams[self.handed_out % len(self.streams)]

    def graph_class(self) -> type:
        """``torch.cuda.CUDAGraph``, over ``torch._C._CUDAGraph``."""
        driver = type("_CUDAGraph", (NewerGraph if self.newer else Driver,), {"cuda": self})
        return type("CUDAGraph", (driver,), {})

    def install_recorder(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "torch.cuda._graph_annotations", self.recorder)

    def next_id(self) -> int:
        self.ids += 1
        return self.ids

    def next_handle(self) -> tuple[int, int]:
        self.handles += 1
        return (0, self.handles)

    @contextmanager
    def on(self, stream: FakeStream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def require_alive(self) -> None:
        if self.lost:
            raise RuntimeError(LOST)

    def count_replay(self) -> None:
        self.require_ordered()
        self.replays += 1
        self.current.before[self.current.number] += 1

    def require_ordered(self) -> None:
        """What is queued on the current stream now comes after every replay; those of streams that it did not wait for run beside it."""
        for each in self.streams_used():
            unordered = each.before[each.number] - self.current.before[each.number]
            assert unordered == 0, f"{unordered} replays of stream {each.number} run beside this"

    def streams_used(self) -> list[FakeStream]:
        return [self.default, *self.streams, *self.own]

    def synchronize(self) -> None:
        self.require_alive()
        for each in self.streams_used():
            for other in self.streams_used():
                each.before |= other.before
        if self.capturing is not None:
            self.capturing.invalid = True
            raise RuntimeError(FORBIDDEN)

    def allocate(self, size: int, device: torch.device, stream: FakeStream) -> int:
        captured = self.capturing is not None and self.capturing.stream is stream
        address = self.take(
            self.users_pool or (self.capturing.pool_id if captured else (0, 0)), size
        )
        self.probes.add(address)
        return address

    def take(self, pool: object, nbytes: int) -> int:
        """The address of bytes in a pool, whose segments hold them."""
        at = self.taken.get(pool, 0)
        self.taken[pool] = at + nbytes
        segments = self.segments.setdefault(pool, [])
        while SEGMENT * len(segments) <= at + nbytes:
            segments.append(SEGMENT * self.next_id())
        return segments[at // SEGMENT] + at % SEGMENT

    def reserved(self) -> int:
        return SEGMENT * sum(map(len, self.segments.values()))

    def mem_get_info(self) -> tuple[int, int]:
        return (_TOTAL - self.reserved() - self.driver) // STEP * STEP, _TOTAL

    def own_stream(self) -> FakeStream:
        self.own.append(FakeStream(self, 100 + len(self.own)))
        return self.own[-1]

    def malloc_in_another_thread(self) -> None:
        """What an allocation elsewhere does that needs new memory of the device."""
        if self.capturing is not None and self.capturing.mode == "global":
            self.capturing.invalid = True
            raise RuntimeError(FORBIDDEN)

    def snapshot(
        self, mempool_id: object = None, include_traces: bool = True
    ) -> list[dict[str, object]]:
        told = {"device": 0, "total_size": SEGMENT}
        return [
            {**told, "address": address, "segment_pool_id": pool}
            for pool, addresses in self.segments.items()
            for address in addresses
            if mempool_id in (None, pool)
        ]

    def empty_cache(self) -> None:
        """Pools that no graph uses go back to the device, unless something lies in them still."""
        used = {pool for pool, count in self.references.items() if count}
        self.held &= used | {*self.workspaces.values()}
        for pool in [each for each in self.segments if each not in self.held]:
            del self.segments[pool], self.taken[pool]

    def take_workspace(self) -> None:
        where = None if self.capturing is None else self.capturing.pool_id
        self.workspaces.setdefault(self.current, where)

    def begin_allocate(self, pool: object, graph: Driver) -> None:
        gone = [each for each, asked in self.pinned_recording.items() if asked() is None]
        assert not gone, "the allocator of pinned memory asks a graph that was destroyed"
        self.references[pool] = self.references.get(pool, 0) + 1
        self.held.add(pool)
        if pool in self.recording or pool in self.pinned_recording:
            raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
        self.recording.add(pool)
        self.pinned_recording[pool] = weakref.ref(graph)

    def end_allocate(self, device: int, pool: object) -> None:
        if pool not in self.recording:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.recording.discard(pool)

    def release(self, device: int, pool: object) -> None:
        self.references[pool] -= 1
        assert self.references[pool] >= 0

    def random_number(self) -> None:
        """What drawing one on the device asserts."""
        if self.generator_captures and self.capturing is None:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")
