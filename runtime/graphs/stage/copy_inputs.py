"""Copied inputs of any callable: in, a callable and which of its arguments have persistent buffers; out, one that fills those first.

It is the field's contract for one compiled graph, over `StaticInputs`, with which a captured model stages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from piecework.errors import ConfigError, InputError
from piecework.runtime.graphs.stage.inputs import StaticInputs
from piecework.runtime.graphs.stage.slots import InputSpec, Number


def make_copy_and_call(
    sym_tensor_indices: Sequence[int],
    input_buffers: Sequence[torch.Tensor],
    callable_fn: Callable[..., object],
    *,
    dims: Sequence[int] | None = None,
    pads: Sequence[Number] | None = None,
    padded_size: Callable[[int], int] = lambda size: size,
    size_indices: Sequence[int] = (),
) -> Callable[..., object]:
    """A callable that copies the arguments at ``sym_tensor_indices`` into ``input_buffers`` and calls ``callable_fn`` with those.

    Args:
        dims, pads: the dynamic dimension of each, and what fills its tail; 0 by default.
        padded_size: the captured size for a batch size; without it nothing is padded.
        size_indices: integer arguments that are the batch size, and become the padded one.

    Raises:
        ConfigError: the declarations do not fit the buffers.
    """
    indices, count = tuple(sym_tensor_indices), len(sym_tensor_indices)
    dims, pads = dims or (0,) * count, pads or (0,) * count
    if not count == len(dims) == len(pads) == len(input_buffers):
        raise ConfigError(
            f"{count} staged arguments, {len(input_buffers)} buffers, {len(dims)} dimensions, {len(pads)} paddings",
            where="make_copy_and_call",
        )
    rows = zip(indices, dims, pads, strict=True)
    inputs = StaticInputs([InputSpec(f"argument {n}", *row) for n, *row in rows], input_buffers)

    def copy_and_call(*args: object) -> object:
        if not indices:
            return callable_fn(*args)
        tensors = [args[n] if n < len(args) else None for n in indices]
        for n, each in zip(indices, tensors, strict=True):
            if not isinstance(each, torch.Tensor):
                kind = type(each).__name__
                raise InputError(
                    f"argument {n} must be a tensor, not a {kind}", where="copy_and_call"
                )
        padded = padded_size(inputs.batch_size(tensors))
        staged = dict(zip(indices, inputs.stage(tensors, padded), strict=True))
        staged.update(dict.fromkeys(size_indices, padded))
        return callable_fn(*(staged.get(n, each) for n, each in enumerate(args)))

    return copy_and_call
