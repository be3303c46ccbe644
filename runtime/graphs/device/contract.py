"""What a static graph is on every device: captured once, then replayed on the same memory."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree

from piecework.codegen.graph.structure import taken_apart
from piecework.errors import StaticGraphError
from piecework.runtime.torch_compat import negative_view, storage_at

Run, Args, Kwargs = Callable[..., object], tuple[object, ...], Mapping[str, object]


class StaticGraph:
    """One captured callable, or none yet; outputs hold results only after the first ``replay``."""

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self._held: Any = None

    def capture(
        self, runnable: Run, args: Args, kwargs: Kwargs, *, weak_output: bool = False
    ) -> object:
        """Capture, and return the output, which owns nothing with ``weak_output``."""
        if self._held is not None:
            raise StaticGraphError("this static graph is captured already", hint="reset() it first")
        self._held, output = self._record(runnable, args, kwargs, weak_output)
        return output

    def _record(
        self, runnable: Run, args: Args, kwargs: Kwargs, weak: bool
    ) -> tuple[object, object]:
        """What a replay needs, and the output."""
        raise NotImplementedError

    def replay(self) -> None:
        """Do the captured work again on the memory as it is now."""
        self.replay_function()()

    def replay_function(self) -> Callable[[], None]:
        """The quickest callable that replays, to be bound once; invalid after ``reset``."""
        raise NotImplementedError

    def require_captured(self) -> Any:
        if self._held is None:
            raise StaticGraphError("nothing was captured", hint="call capture() first")
        return self._held

    def reset(self) -> None:
        """Give up what was captured; a later ``capture`` may follow."""
        self._held = None


class GraphPlatform:
    """How graphs are made on one device; ``stand_in``: a replay runs Python, as the CPU's does."""

    device: torch.device
    unmarked: str
    stand_in = False

    def new_pool(self) -> Any:
        """Memory for outputs, with ``nbytes`` and ``driver_bytes`` of them, and ``clear``."""
        raise NotImplementedError

    def new_graph(self, pool: Any, *, marked: bool = False) -> StaticGraph:
        """A graph; ``marked``: its kernels carry the statement that they were captured for."""
        raise NotImplementedError

    def computes_on(self, device: torch.device) -> bool:
        """Whether a graph records work on ``device``; elsewhere it is done once, at the capture."""
        return device == self.device

    def is_capturing(self) -> bool:
        """Whether somebody captures what this thread does now; a replay would be an error."""
        raise NotImplementedError

    def call_order(self) -> Callable[[], None] | None:
        """Lets a call that uses the graphs come after the one before on the device, if need be."""
        return None

    def release_cached_memory(self) -> None:
        """Hand back what the device's allocator only caches, so that the pool can have it."""

    def synchronize(self) -> None:
        """Wait until the device has done what was queued."""


def weak_ref_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory in a tensor that does not keep it alive; without plain memory, itself."""
    if not owns_plain_memory(tensor):
        return tensor
    if tensor.numel() == 0:
        with torch.inference_mode(False):
            return torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
            )
    storage = tensor.untyped_storage()
    unowned = storage_at(storage.data_ptr(), tensor.device, storage.nbytes())
    return view_of_storage(unowned, like=tensor)


def weak_ref_tensors(tree: object) -> object:
    """``weak_ref_tensor`` of every tensor in ``tree``; other leaves and the containers stay."""
    return pytree.tree_map_only(torch.Tensor, weak_ref_tensor, tree)


def owns_plain_memory(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` is dense memory on a real device, so that an address describes it."""
    return (
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.layout is torch.strided
        and tensor.device.type != "meta"
        and not tensor.is_quantized
    )


def plain_parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Itself, or the plain tensors that a subclass holds; none where that can't be told."""
    apart = taken_apart(tensor)
    if apart is None:
        return [tensor] if owns_plain_memory(tensor) else []
    parts = [plain_parts(each) for each in apart[0].values()]
    return [part for each in parts for part in each] if all(parts) else []


def view_of_storage(
    storage: torch.UntypedStorage, *, like: torch.Tensor, byte_shift: int = 0
) -> torch.Tensor:
    """Like ``like``, never an inference tensor: graphs are replayed outside of that mode too."""
    offset = like.storage_offset() - byte_shift // like.element_size()
    with torch.inference_mode(False):
        base = torch.empty(0, dtype=like.dtype, device=like.device)
        view = base.set_(storage, offset, like.shape, like.stride())
        if like.is_conj():
            view = view.conj()
        return negative_view(view) if like.is_neg() else view
