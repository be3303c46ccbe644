"""A block in which functions are told of every operator that reaches the dispatcher."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

Before = Callable[[torch._ops.OpOverload, tuple[object, ...], dict[str, object]], None]
After = Callable[[torch._ops.OpOverload, tuple[object, ...], object], None]
BodyOf = Callable[[torch._ops.OpOverload, tuple[object, ...]], "Callable[..., object] | None"]


class OperatorWatch(TorchDispatchMode):
    """Tells of every operator, and of those that a user's operator runs inside."""

    # Higher-order operators (flex attention) go through; what they run inside is not looked at.
    supports_higher_order_operators = True

    def __init__(self, before: Before, body_of: BodyOf, after: After) -> None:
        super().__init__()
        self._before, self._body_of, self._after = before, body_of, after

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if not isinstance(func, torch._ops.OpOverload):
            return func(*args, **kwargs)
        self._before(func, args, kwargs)
        body = None if func.namespace == "aten" else self._body_of(func, args)
        if body is None:
            result = func(*args, **kwargs)
        else:
            with self:
                result = body(*args, **kwargs)
        self._after(func, args, result)
        return result


def written_operands(
    op: torch._ops.OpOverload, args: tuple[object, ...], kwargs: dict[str, object]
) -> Iterator[torch.Tensor]:
    """The tensors that a call of ``op`` writes to, by its schema."""
    for index, argument in enumerate(op._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        given = args[index] if index < len(args) else kwargs.get(argument.name)
        for each in given if isinstance(given, (list, tuple)) else (given,):
            if isinstance(each, torch.Tensor):
                yield each


def storage_mark(tensor: torch.Tensor) -> object:
    """Keeps a `storage_id` from being used again while it lives; the memory may be freed."""
    return StorageWeakRef(tensor.untyped_storage())


def places_guard(tensors: list[torch.Tensor]) -> tuple[Callable[[], bool], bool]:
    """True while each tensor's memory is where it is now, and whether that is quick to ask."""
    addresses = [tensor.data_ptr() for tensor in tensors]
    fast = getattr(torch._C, "_tensors_data_ptrs_at_indices_equal", None)
    if fast is not None:
        indices = list(range(len(tensors)))
        return lambda: fast(tensors, addresses, indices), True
    address = torch.Tensor.data_ptr
    return lambda: list(map(address, tensors)) == addresses, False
