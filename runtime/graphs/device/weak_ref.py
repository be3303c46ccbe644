"""Weak references to tensors: the same memory without owning it; who reads one answers for it."""

from __future__ import annotations

import torch
from torch.utils import _pytree as pytree

from piecework.codegen.graph.structure import taken_apart
from piecework.runtime.torch_compat import negative_view, storage_at


def weak_ref_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory in a tensor that does not keep it alive.

    A tensor without plain memory (sparse, a subclass, on the meta device) is returned as it is; one
    without elements becomes a new one.

    Example:
        >>> t = torch.arange(3)
        >>> weak_ref_tensor(t).data_ptr() == t.data_ptr()
        True
    """
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
    """A tensor like ``like`` over ``storage``, ``byte_shift`` bytes earlier in it.

    It is never an inference tensor: graphs that were captured under ``torch.inference_mode`` are
    replayed outside of it too, and operators write into their results there.
    """
    offset = like.storage_offset() - byte_shift // like.element_size()
    with torch.inference_mode(False):
        base = torch.empty(0, dtype=like.dtype, device=like.device)
        view = base.set_(storage, offset, like.shape, like.stride())
        if like.is_conj():
            view = view.conj()
        return negative_view(view) if like.is_neg() else view
