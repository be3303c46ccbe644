"""Static graphs without a GPU: in, a callable and its inputs; out, the same contract as a CUDA graph, kept by re-running it.

It never adapts to moved inputs or changed contexts: it fails in the ways a CUDA graph fails, so that tests find them.
"""

from __future__ import annotations

import contextvars
import ctypes
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from piecework.errors import StaticGraphError
from piecework.runtime.batch.forward_context import (
    ForwardContext,
    current_forward_context,
    override_forward_context,
)
from piecework.runtime.graphs.device.contract import StaticGraph
from piecework.runtime.graphs.device.weak_ref import (
    owns_plain_memory,
    plain_parts,
    view_of_storage,
    weak_ref_tensors,
)
from piecework.runtime.torch_compat import flatten_tree, unflatten_tree
from piecework.scope import set_for

# All bits set is NaN in every floating type and -1 in the integers: whoever reads it too early sees it.
POISON_BYTE = 0xFF
_ALIGNMENT = 64
# While a callable is captured, and while it is run again in place of its replay: what it did then, it does now.
_CAPTURING: contextvars.ContextVar[bool] = contextvars.ContextVar("capturing", default=False)


class CpuGraphPlatform:
    """Static graphs on the CPU."""

    device = torch.device("cpu")
    unmarked = "graphs on the CPU hold no kernels"

    def new_pool(self) -> CpuGraphPool:
        return CpuGraphPool()

    def new_graph(self, pool: CpuGraphPool, *, marked: bool = False) -> CpuStaticGraph:
        return CpuStaticGraph(pool)

    def computes_on(self, device: torch.device) -> bool:
        return device.type == "cpu"

    def is_capturing(self) -> bool:
        return _CAPTURING.get()

    def call_order(self) -> None:
        """Nothing: a call is done when it returns."""

    def release_cached_memory(self) -> None:
        """Nothing: the CPU allocator keeps no pool of its own."""

    def synchronize(self) -> None:
        """Nothing: work on the CPU is done when the call returns."""


@dataclass(eq=False)
class CpuGraphPool:
    """Blocks of output memory, and no driver's; one is free again when the last tensor over it is gone, as in CUDA's private pools."""

    _blocks: list[torch.Tensor] = field(default_factory=list)
    _free: list[torch.Tensor] = field(default_factory=list)
    driver_bytes: ClassVar[int] = 0

    @property
    def nbytes(self) -> int:
        return sum(block.nbytes for block in self._blocks)

    def clear(self) -> None:
        self._blocks.clear()
        self._free.clear()

    def owns(self, tensor: torch.Tensor) -> bool:
        """Whether ``tensor`` lies in a block, which stays until the pool is cleared."""
        start = tensor.untyped_storage().data_ptr()
        return any(
            block.data_ptr() <= start < block.data_ptr() + block.nbytes for block in self._blocks
        )

    def take(self, nbytes: int) -> tuple[torch.UntypedStorage, torch.Tensor]:
        """A poisoned storage of ``nbytes``, and the same bytes as a tensor that stays usable after it is freed."""
        block = self._smallest_free(nbytes)
        if block is None:
            rounded = -(-nbytes // _ALIGNMENT) * _ALIGNMENT
            with torch.inference_mode(False):
                block = torch.empty(rounded, dtype=torch.uint8)
            self._blocks.append(block)
        window = block[:nbytes]
        window.fill_(POISON_BYTE)
        lease = (ctypes.c_char * nbytes).from_address(block.data_ptr())
        weakref.finalize(lease, self._give_back, block).atexit = False
        with torch.inference_mode(False):
            storage = torch.frombuffer(lease, dtype=torch.uint8).untyped_storage()
        return storage, window

    def _smallest_free(self, nbytes: int) -> torch.Tensor | None:
        fitting = [block for block in self._free if block.nbytes >= nbytes]
        if not fitting:
            return None
        best = min(fitting, key=lambda block: block.nbytes)
        self._free = [block for block in self._free if block is not best]
        return best

    def _give_back(self, block: torch.Tensor) -> None:
        if any(block is mine for mine in self._blocks):
            self._free.append(block)


_Layout = tuple[object, ...]


def _layout(leaf: object) -> _Layout | None:
    """What must not change between capture and replay about one output; None for one that is no tensor."""
    if not isinstance(leaf, torch.Tensor):
        return None
    nbytes = leaf.untyped_storage().nbytes()
    return (leaf.dtype, leaf.shape, leaf.stride(), leaf.storage_offset(), nbytes)


@dataclass(frozen=True, slots=True)
class _Recording:
    """Everything that a replay uses, frozen at capture; ``copies``: output → where the bytes of its storage go."""

    runnable: Callable[..., object]
    args: tuple[object, ...]
    kwargs: Mapping[str, object]
    context: ForwardContext | None
    layouts: tuple[_Layout | None, ...]
    copies: Mapping[int, torch.Tensor]


class CpuStaticGraph(StaticGraph[CpuGraphPool, _Recording]):
    """A callable re-run on the inputs of its capture, its results written to the outputs of its capture.

    Inputs outside the pool are held strongly, where a CUDA graph would read freed memory: the error is the same (stale
    values), the process survives it. Inputs in the pool are not: their memory goes to later captures. The forward context is frozen too, as what Python read from it would be on CUDA.
    """

    def _record(
        self,
        runnable: Callable[..., object],
        args: tuple[object, ...],
        kwargs: Mapping[str, object],
        weak: bool,
    ) -> tuple[_Recording, object]:
        inputs = _storages(flatten_tree((args, kwargs))[0])
        with torch.no_grad(), _contents_kept(inputs), set_for(_CAPTURING, True):
            output = runnable(*args, **kwargs)
            leaves, spec = flatten_tree(output)
        static, layouts, copies = self._make_static(leaves, {s.data_ptr() for s in inputs})
        held_args, held_kwargs = self._unowned((args, kwargs))
        context = current_forward_context()
        held = _Recording(runnable, held_args, held_kwargs, context, layouts, copies)
        result = unflatten_tree(static, spec)
        return held, weak_ref_tensors(result) if weak else result

    def replay(self) -> None:
        if _CAPTURING.get():
            raise StaticGraphError(
                "a replay while something is captured", hint="run the callable itself there"
            )
        # In a copy of the context variables: an interrupt can't leave the capture's forward context to the caller.
        contextvars.copy_context().run(self._run_again, self.require_captured())

    def _run_again(self, recording: _Recording) -> None:
        with (
            torch.no_grad(),
            override_forward_context(recording.context),
            set_for(_CAPTURING, True),
        ):
            leaves, _ = flatten_tree(recording.runnable(*recording.args, **recording.kwargs))
            self._check_layouts(leaves, recording.layouts)
            for leaf, window in recording.copies.items():
                window.copy_(_bytes_of(leaves[leaf].untyped_storage()))

    def replay_function(self) -> Callable[[], None]:
        self.require_captured()
        return self.replay

    def _unowned(self, inputs: object) -> tuple[tuple[object, ...], Mapping[str, object]]:
        """``inputs`` with weak references to what lies in the pool: a later capture may use that memory, as on CUDA."""
        leaves, spec = flatten_tree(inputs)
        held = [
            (
                weak_ref_tensors(leaf)
                if isinstance(leaf, torch.Tensor) and self._is_pooled(leaf)
                else leaf
            )
            for leaf in leaves
        ]
        return unflatten_tree(held, spec)  # type: ignore[return-value]

    def _is_pooled(self, tensor: torch.Tensor) -> bool:
        return owns_plain_memory(tensor) and tensor.numel() > 0 and self._pool.owns(tensor)

    def _make_static(
        self, leaves: list[object], input_pointers: set[int]
    ) -> tuple[list[object], tuple[_Layout | None, ...], dict[int, torch.Tensor]]:
        """Give every fresh output storage a block of the pool; outputs that alias an input stay where they are."""
        static: list[object] = []
        copies: dict[int, torch.Tensor] = {}
        blocks: dict[int, torch.UntypedStorage] = {}
        for index, leaf in enumerate(leaves):
            if not isinstance(leaf, torch.Tensor):
                static.append(leaf)
                continue
            if not owns_plain_memory(leaf) or leaf.device.type != "cpu":
                raise StaticGraphError(
                    f"output {index} is a {leaf.layout} {type(leaf).__name__} on {leaf.device}, not plain CPU memory",
                    hint="return dense tensors, or run this piece uncaptured",
                )
            pointer, nbytes = leaf.untyped_storage().data_ptr(), leaf.untyped_storage().nbytes()
            if nbytes == 0 or pointer in input_pointers:
                static.append(leaf.detach())
                continue
            if pointer not in blocks:
                blocks[pointer], copies[index] = self._pool.take(nbytes)
            with torch.inference_mode(False):
                static.append(view_of_storage(blocks[pointer], like=leaf))
        return static, tuple(map(_layout, leaves)), copies

    @staticmethod
    def _check_layouts(leaves: list[object], layouts: tuple[_Layout | None, ...]) -> None:
        found = tuple(map(_layout, leaves))
        if found != layouts:
            index = next(
                (i for i, (a, b) in enumerate(zip(found, layouts, strict=False)) if a != b),
                min(len(found), len(layouts)),
            )
            raise StaticGraphError(
                f"output {index} came out with another layout than at capture",
                hint="a captured callable must not depend on the values of its inputs for shapes",
            )


def _storages(leaves: list[object]) -> list[torch.UntypedStorage]:
    """The distinct storages of the tensors among ``leaves``, without the empty ones."""
    found: dict[int, torch.UntypedStorage] = {}
    for leaf in leaves:
        for part in plain_parts(leaf) if isinstance(leaf, torch.Tensor) else ():
            storage = part.untyped_storage()
            if storage.nbytes() and part.device.type == "cpu":
                found.setdefault(storage.data_ptr(), storage)
    return list(found.values())


@contextmanager
def _contents_kept(storages: list[torch.UntypedStorage]) -> Iterator[None]:
    """Undo in-place changes of ``storages``: capturing on CUDA computes nothing, so it must not here."""
    saved = [_bytes_of(storage).clone() for storage in storages]
    try:
        yield
    finally:
        for storage, before in zip(storages, saved, strict=True):
            now = _bytes_of(storage)
            if not torch.equal(now, before):
                now.copy_(before)


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    """Every byte of ``storage`` as a tensor over the same memory."""
    with torch.inference_mode(False):
        return torch.empty(0, dtype=torch.uint8).set_(storage)
