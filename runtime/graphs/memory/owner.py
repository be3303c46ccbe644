"""Everything static that one compiled model owns: its pool, its address book, its captures."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from piecework.errors import StaticGraphError
from piecework.runtime.batch.descriptor import BatchDescriptor, Key
from piecework.runtime.batch.mode import CUDAGraphMode
from piecework.runtime.graphs.device.contract import GraphPlatform, StaticGraph
from piecework.runtime.graphs.device.cpu import CpuGraphPlatform
from piecework.runtime.graphs.device.cuda import CudaGraphPlatform
from piecework.runtime.graphs.memory.addresses import AddressBook, AddressPolicy

# How long a capture waits for a call to leave the memory, in seconds.
_PATIENCE = 60.0


def platform_for(device: torch.device | str) -> GraphPlatform:
    """The platform that captures on ``device``; a `StaticGraphError` where none does."""
    device = torch.device(device)
    if device.type == "cpu":
        return CpuGraphPlatform()
    if device.type == "cuda":
        return CudaGraphPlatform(device)
    why = f"no static graphs on {device.type!r} devices"
    hint = "use cudagraph_mode NONE, or a CPU or CUDA device"
    raise StaticGraphError(why, where=str(device), hint=hint)


@dataclass(frozen=True, slots=True)
class CaptureRecord:
    """One capture that happened."""

    name: str
    mode: CUDAGraphMode
    descriptor: BatchDescriptor
    nbytes: int = 0  # what it added to the pool
    staged_bytes: int = 0  # and outside of it, for fresh inputs
    eager_reason: str | None = None  # why the address policy lets the piece run uncaptured
    driver_bytes: int = 0  # how much of ``nbytes`` the driver took, for the graph itself

    @property
    def key(self) -> Key:
        return self.mode, self.descriptor

    @property
    def where(self) -> str:
        return f"{self.name}, {self.mode.name} {self.descriptor.describe()}"


def failed_capture(error: Exception, where: str) -> StaticGraphError:
    """What is told of ``error``, which a capture ended with."""
    if isinstance(error, StaticGraphError):
        return StaticGraphError(error.message, where=where, hint=error.hint)
    why = f"the capture failed: {type(error).__name__}: {error}"
    hint = "run this batch shape uncaptured to see whether the model itself fails"
    return StaticGraphError(why, where=where, hint=hint)


class _SharedPool:
    """A pool, and who uses it."""

    def __init__(self, platform: GraphPlatform) -> None:
        self.pool = platform.new_pool()
        self.call_order = platform.call_order()
        self.owners: weakref.WeakSet[StaticGraphs] = weakref.WeakSet()
        self.users: dict[int, object] = {}
        self.lock = threading.RLock()
        self.alone: int | None = None


class StaticGraphs:
    """The static graphs of one model: one pool, one address book, one capture phase.

    Args:
        platform: where graphs are captured, or a device to look it up by.
        address_policy: what becomes of fresh tensors that enter a captured piece.
        lazy: allow captures at any time, until capturing is closed.
        check_addresses: check the inputs of every replay, not only of the first (debugging).
        mark_kernels: let kernels inside graphs carry the statement that they were captured for.
        memory_of: another owner on this device, whose pool this one uses; one of them captures or
            runs at a time, and what one returned may be overwritten by the other.

    Example:
        >>> graphs = StaticGraphs("cpu")
        >>> with graphs.capturing():
        ...     graphs.is_open
        True
    """

    def __init__(
        self,
        platform: GraphPlatform | torch.device | str,
        *,
        address_policy: AddressPolicy | str = AddressPolicy.COPY,
        lazy: bool = False,
        check_addresses: bool = False,
        mark_kernels: bool = False,
        memory_of: StaticGraphs | None = None,
    ) -> None:
        self.platform: GraphPlatform = (
            platform_for(platform) if isinstance(platform, (str, torch.device)) else platform
        )
        if memory_of is not None and memory_of.platform.device != self.platform.device:
            why = f"the graphs whose memory is to be used are on {memory_of.platform.device}"
            raise StaticGraphError(why, where=str(self.platform.device), hint="leave memory_of out")
        shared = _SharedPool(self.platform) if memory_of is None else memory_of._shared
        shared.owners.add(self)
        self._shared, self.pool = shared, shared.pool
        self.users = shared.users  # who is running graphs of this memory, under 0
        self.call_order = shared.call_order  # see `GraphPlatform.call_order`
        self.addresses = AddressBook()
        self.address_policy = AddressPolicy.parse(address_policy)
        self.check_addresses = check_addresses
        # why kernels inside graphs don't carry what they stand for; "" where they do
        self.unmarked = self.platform.unmarked if mark_kernels else "mark_kernels is off"
        self.records: list[CaptureRecord] = []
        self.is_open = lazy
        self.in_phase = False  # a capture phase is on, which says itself what it captured
        self.staging_bytes = 0  # allocated for fresh inputs since the graphs were last given up
        # Shapes of which a piece was replayed, so that the forward that captured them is over.
        self.in_use: set[Key] = set()
        self._busy_with: str | None = None
        self._holders: weakref.WeakSet[Any] = weakref.WeakSet()
        self._staging: dict[object, torch.Tensor] = {}

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """The capture phase; afterwards capturing is closed, even where it was lazy before."""
        with self.alone():
            self.is_open = self.in_phase = True
            try:
                yield
                self.platform.synchronize()
            finally:
                self.is_open = self.in_phase = False

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Have this memory to oneself: calls that come meanwhile, of any model, run uncaptured."""
        shared, me, mine = self._shared, threading.get_ident(), object()
        if shared.alone == me:
            yield
            return
        give_up = time.monotonic() + _PATIENCE
        try:
            while self.users.setdefault(0, mine) is not mine:
                if time.monotonic() > give_up:
                    why = "a call uses the memory that is to be captured into, and does not return"
                    hint = "capture outside of calls of the model"
                    raise StaticGraphError(why, where=str(self.platform.device), hint=hint)
                time.sleep(0.001)
            shared.alone = me
            with shared.lock:
                yield
        finally:
            if self.users.get(0) is mine:
                shared.alone = None
                del self.users[0]

    def others_capture(self) -> bool:
        """Whether somebody else captures what this thread does: it can't replay or capture here."""
        return self._busy_with is None and self.platform.is_capturing()

    def require_open(self, record: CaptureRecord) -> None:
        """Refuse to capture outside the phase, or pieces of one shape in several forwards."""
        if not self.is_open:
            raise StaticGraphError(
                "capture outside the capture phase",
                where=record.where,
                hint="capture this batch shape before serving, or dispatch it to a captured one "
                "or to NONE",
            )
        # Later the pool counts outputs of earlier pieces as free, though this forward reads them.
        if record.key in self.in_use:
            self.platform.synchronize()
            self.discard(*record.key)
            why = "earlier pieces of this batch shape were captured in another forward"
            hint = "capture all pieces of a shape in one forward; the next one may"
            raise StaticGraphError(why, where=record.where, hint=hint)

    def register(self, holder: Any) -> None:
        """Remember (weakly) who holds captures and has ``discard`` and ``clear_graphs``."""
        self._holders.add(holder)

    @contextmanager
    def one_capture(self, record: CaptureRecord, *, collects: bool = True) -> Iterator[StaticGraph]:
        """A new graph to capture into, measured and recorded; captures never nest or overlap."""
        with self._shared.lock, torch.profiler.record_function(f"capture {record.where}"):
            self.require_open(record)
            if self._busy_with is not None:
                why = f"a capture inside the capture of {self._busy_with}"
                hint = "nest FULL outside PIECEWISE, and let the context's mode pick one"
                raise StaticGraphError(why, where=record.where, hint=hint)
            self._busy_with = record.name
            before, driver = self.pool.nbytes, self.pool.driver_bytes
            try:
                if collects:
                    gc.collect(1 if self.in_phase else 2)  # a phase begins with a full collection
                    self.platform.release_cached_memory()
                yield self.platform.new_graph(self.pool, marked=not self.unmarked)
            except Exception as error:
                raise failed_capture(error, record.where) from error
            finally:
                self._busy_with = None
            took, driver = self.pool.nbytes - before, self.pool.driver_bytes - driver
            self.records.append(replace(record, nbytes=took, driver_bytes=driver))

    def staging_memory(self, buffer: object, nbytes: int, device: torch.device) -> torch.Tensor:
        """The bytes of one static buffer of a piece, which all its batch shapes share."""
        # One shape runs at a time, and fills it right before; the largest is captured first.
        known = self._staging.get(buffer)
        if known is not None and known.nbytes >= nbytes and known.device == device:
            return known
        with torch.inference_mode(False):
            found = self._staging[buffer] = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self.staging_bytes += nbytes
        return found

    @property
    def nbytes(self) -> int:
        """What the captures hold now: the pool, and the static buffers of fresh inputs."""
        return self.pool.nbytes + sum(record.staged_bytes for record in self.records)

    def bytes_by_descriptor(self) -> Mapping[Key, int]:
        """What each descriptor added when it was captured, all its pieces together."""
        totals: Counter[Key] = Counter()
        for record in self.records:
            totals[record.key] += record.nbytes + record.staged_bytes
        return totals

    def discard(self, mode: CUDAGraphMode, descriptor: BatchDescriptor) -> None:
        """Forget what was captured for one descriptor, in every piece: part of it is of no use."""
        for holder in list(self._holders):
            holder.discard(mode, descriptor)
        self.in_use.discard((mode, descriptor))
        self.addresses.forget_captured(descriptor)
        self.records = [each for each in self.records if each.key != (mode, descriptor)]

    def clear_all_graphs(self) -> None:
        """Forget every capture and give the pool's memory back, unless others use it."""
        self.platform.synchronize()
        # A graph that can't be reset keeps no other one, and is told at the end.
        with self._shared.lock, ExitStack() as every:
            every.callback(self._forget)
            for holder in list(self._holders):
                every.callback(holder.clear_graphs)

    def _forget(self) -> None:
        self.in_use.clear()
        self._staging.clear()
        self.staging_bytes = 0
        self.addresses.forget_captured()
        self.records.clear()
        if not any(owner.records for owner in self._shared.owners):
            self.pool.clear()
