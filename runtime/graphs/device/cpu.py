"""Static graphs without a GPU: the contract of a CUDA graph, kept by running the callable again."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

from piecework.errors import StaticGraphError
from piecework.runtime.batch.forward_context import (
    current_forward_context,
    override_forward_context,
)
from piecework.runtime.graphs.device.contract import (
    Args,
    GraphPlatform,
    Kwargs,
    Run,
    StaticGraph,
    owns_plain_memory,
    plain_parts,
    view_of_storage,
    weak_ref_tensor,
    weak_ref_tensors,
)
from piecework.runtime.torch_compat import flatten_tree, storage_users, unflatten_tree
from piecework.scope import set_for

# All bits set is NaN in every floating type and -1 in the integers: who reads too early sees it.
POISON_BYTE = 0xFF
_ALIGNMENT = 64
# Set while a callable is captured, and while it is run again in place of its replay.
_CAPTURING: contextvars.ContextVar[bool] = contextvars.ContextVar("capturing", default=False)


class CpuGraphPlatform(GraphPlatform):
    device = torch.device("cpu")
    unmarked = "graphs on the CPU hold no kernels"
    stand_in = True

    def new_pool(self) -> CpuGraphPool:
        return CpuGraphPool()

    def new_graph(self, pool: CpuGraphPool, *, marked: bool = False) -> CpuStaticGraph:
        return CpuStaticGraph(pool)

    def computes_on(self, device: torch.device) -> bool:
        return device.type == "cpu"

    def is_capturing(self) -> bool:
        return _CAPTURING.get()


class CpuGraphPool:
    """Blocks of output memory; one is free again when the last tensor over it is gone."""

    driver_bytes = 0

    def __init__(self) -> None:
        self._blocks: list[torch.Tensor] = []

    @property
    def nbytes(self) -> int:
        return sum(block.nbytes for block in self._blocks)

    def clear(self) -> None:
        self._blocks.clear()

    def owns(self, leaf: object) -> bool:
        """Whether ``leaf`` lies in a block, which stays until the pool is cleared."""
        if not isinstance(leaf, torch.Tensor) or not owns_plain_memory(leaf) or not leaf.numel():
            return False
        start = leaf.untyped_storage().data_ptr()
        return any(b.data_ptr() <= start < b.data_ptr() + b.nbytes for b in self._blocks)

    def take(self, nbytes: int) -> tuple[torch.UntypedStorage, torch.Tensor]:
        """A poisoned storage, and its bytes as a tensor that does not keep it from being free."""
        with torch.inference_mode(False):
            new = torch.empty(-(-nbytes // _ALIGNMENT) * _ALIGNMENT, dtype=torch.uint8)
            free = [b for b in self._blocks if storage_users(b) == storage_users(new)]
            fitting = [block for block in free if block.nbytes >= nbytes]
            block = min(fitting, key=lambda block: block.nbytes, default=new)
            if not fitting:
                self._blocks.append(new)
            window = block[:nbytes].fill_(POISON_BYTE)
        return block.untyped_storage(), weak_ref_tensor(window)


class CpuStaticGraph(StaticGraph):
    """Runs again on the inputs of its capture, and copies the results to the outputs of then."""

    def _record(
        self, runnable: Run, args: Args, kwargs: Kwargs, weak: bool
    ) -> tuple[Callable[[], None], object]:
        given, spec = flatten_tree((args, kwargs))
        inputs = _storages(given)
        with torch.no_grad(), _contents_kept(inputs), set_for(_CAPTURING, True):
            leaves, output_spec = flatten_tree(runnable(*args, **kwargs))
        static, copies = self._make_static(leaves, inputs)
        kept = [weak_ref_tensors(each) if self._pool.owns(each) else each for each in given]
        held_args, held_kwargs = unflatten_tree(kept, spec)
        layouts, context = list(map(_layout, leaves)), current_forward_context()
        del leaves, given

        def run_again() -> None:
            with torch.no_grad(), override_forward_context(context), set_for(_CAPTURING, True):
                now, _ = flatten_tree(runnable(*held_args, **held_kwargs))
                found = list(map(_layout, now))
                if found != layouts:
                    pairs = enumerate(zip(found, layouts, strict=False))
                    index = next((n for n, (new, then) in pairs if new != then), 0)
                    raise StaticGraphError(
                        f"output {index} came out with another layout than at capture",
                        hint="shapes must not depend on the values of a captured callable's inputs",
                    )
                for index, window in copies.items():
                    window.copy_(_bytes_of(now[index].untyped_storage()))

        result = unflatten_tree(static, output_spec)
        return run_again, weak_ref_tensors(result) if weak else result

    def replay_function(self) -> Callable[[], None]:
        self.require_captured()
        return self._replay

    def _replay(self) -> None:
        if _CAPTURING.get():
            raise StaticGraphError(
                "a replay while something is captured", hint="run the callable itself there"
            )
        # In a copy of the context: an interrupt can't leave the capture's forward context behind.
        contextvars.copy_context().run(self.require_captured())

    def _make_static(
        self, leaves: list[object], inputs: Mapping[int, torch.UntypedStorage]
    ) -> tuple[list[object], dict[int, torch.Tensor]]:
        """Give each new output storage a block; what aliases an input stays where it is."""
        static = list(leaves)
        copies: dict[int, torch.Tensor] = {}
        blocks: dict[int, torch.UntypedStorage] = {}
        for index, leaf in enumerate(leaves):
            if not isinstance(leaf, torch.Tensor):
                continue
            if not owns_plain_memory(leaf) or leaf.device.type != "cpu":
                raise StaticGraphError(
                    f"output {index} is a {leaf.layout} {type(leaf).__name__} on {leaf.device}, "
                    "not plain CPU memory",
                    hint="return dense tensors, or run this piece uncaptured",
                )
            storage = leaf.untyped_storage()
            pointer = storage.data_ptr()
            if not storage.nbytes() or pointer in inputs:
                static[index] = leaf.detach()
                continue
            if pointer not in blocks:
                blocks[pointer], copies[index] = self._pool.take(storage.nbytes())
            static[index] = view_of_storage(blocks[pointer], like=leaf)
        return static, copies


def _layout(leaf: object) -> object:
    """What must not change between capture and replay about one output."""
    if not isinstance(leaf, torch.Tensor):
        return None
    size = leaf.untyped_storage().nbytes()
    return leaf.dtype, leaf.shape, leaf.stride(), leaf.storage_offset(), size


def _storages(leaves: list[object]) -> dict[int, torch.UntypedStorage]:
    """The storages of the tensors among ``leaves`` by address, without the empty ones."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    parts = [p.untyped_storage() for x in tensors for p in plain_parts(x) if p.device.type == "cpu"]
    return {storage.data_ptr(): storage for storage in parts if storage.nbytes()}


@contextmanager
def _contents_kept(storages: Mapping[int, torch.UntypedStorage]) -> Iterator[None]:
    """Undo in-place changes of ``storages``: capturing on CUDA computes nothing either."""
    saved = [(now := _bytes_of(storage), now.clone()) for storage in storages.values()]
    try:
        yield
    finally:
        for now, before in saved:
            if not torch.equal(now, before):
                now.copy_(before)


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
