"""Copied inputs of any callable. In: a callable and which of its arguments have persistent buffers. Out: a callable that fills those first.

It is the field's contract for one compiled graph; a captured model stages by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from piecework.errors import ConfigError, InputError
from piecework.runtime.graphs.stage.inputs import Kernel, StaticInputs
from piecework.runtime.graphs.stage.slots import InputSpec, Number


def make_copy_and_call(
    sym_tensor_indices: Sequence[int],
    input_buffers: Sequence[torch.Tensor],
    callable_fn: Callable[..., object],
    *,
    dims: Sequence[int] | None = None,
    pads: Sequence[Number] | None = None,
    padded_size: Callable[[int], int] | None = None,
    size_indices: Sequence[int] = (),
    kernel: Kernel = "auto",
) -> Callable[..., object]:
    """A callable that copies some arguments into persistent buffers before it calls ``callable_fn`` with those.

    Args:
        sym_tensor_indices: which positional arguments are copied.
        input_buffers: their buffers, of the largest size.
        callable_fn: what is called.
        dims: the dynamic dimension of each; 0 by default.
        pads: what fills the tail of each; 0 by default.
        padded_size: the captured size for a batch size; without it nothing is padded.
        size_indices: integer arguments that are the batch size, and become the padded one.
        kernel: as for ``StaticInputs``.

    Raises:
        ConfigError: the declarations do not fit the buffers.

    Example:
        >>> add = make_copy_and_call([0], [torch.zeros(8)], lambda x, n: x + n, padded_size=lambda n: 4, size_indices=[1])
        >>> add(torch.ones(3), 3).tolist()
        [5.0, 5.0, 5.0, 4.0]
    """
    count = len(sym_tensor_indices)
    indices = tuple(sym_tensor_indices)
    dims = (0,) * count if dims is None else dims
    pads = (0,) * count if pads is None else pads
    if not count == len(dims) == len(pads) == len(input_buffers):
        raise ConfigError(
            f"{count} staged arguments, {len(input_buffers)} buffers, {len(dims)} dimensions, "
            f"{len(pads)} paddings",
            where="make_copy_and_call",
        )
    specs = [
        InputSpec(f"argument {index}", dim, pad)
        for index, dim, pad in zip(indices, dims, pads, strict=True)
    ]
    inputs = StaticInputs(specs, input_buffers, kernel)

    def copy_and_call(*args: object) -> object:
        if not indices:
            return callable_fn(*args)
        tensors = [_tensor(args, index) for index in indices]
        largest = max(
            tensor.shape[dim] if -tensor.dim() <= dim < tensor.dim() else 0
            for tensor, dim in zip(tensors, dims, strict=True)
        )
        padded = largest if padded_size is None else padded_size(largest)
        staged = list(args)
        for index, static in zip(indices, inputs.stage(tensors, padded), strict=True):
            staged[index] = static
        for index in size_indices:
            staged[index] = padded
        return callable_fn(*staged)

    return copy_and_call


def _tensor(args: tuple[object, ...], index: int) -> torch.Tensor:
    value = args[index] if index < len(args) else None
    if not isinstance(value, torch.Tensor):
        raise InputError(
            f"argument {index} must be a tensor, not a {type(value).__name__}",
            where="make_copy_and_call",
        )
    return value
