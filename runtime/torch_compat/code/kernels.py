"""Registered operators. In: an operator's name. Out: the kernel behind it, and whether it is still the same."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Sized

import torch
from torch._library.custom_ops import OPDEFS

from piecework.code_objects import cells_of


def registered_kernels() -> Sized:
    """A collection that grows when ``torch.library`` registers a kernel."""
    return torch.library._impls


def kernel_table(name: str) -> str:
    """The dispatcher's table of operator ``ns::op.overload``, as text to compare."""
    return torch._C._dispatch_dump(name)


def custom_op_kernel(name: str, device_type: str) -> Callable[..., object] | None:
    """What a ``torch.library.custom_op`` runs for plain tensors on ``device_type``, with the wrappers around it; None for any other operator.

    It is looked up afresh, so that two results tell whether the kernel was replaced or disabled meanwhile.
    """
    definition = OPDEFS.get(name)
    if definition is None or not definition._backend_fns:
        return None
    kernels = definition._backend_fns
    key = device_type if device_type in kernels else None
    if key in definition._disabled_kernel:
        return definition._init_fn
    return kernels.get(key)


def custom_op_function(kernel: Callable[..., object]) -> Callable[..., object]:
    """The user's function inside a result of `custom_op_kernel`."""
    return inspect.unwrap(_innermost(kernel))


def _innermost(function: Callable[..., object]) -> Callable[..., object]:
    """The function that ``CustomOpDef.register_kernel`` wrapped: its wrappers close over it as ``fn``."""
    seen = 0
    while isinstance(function, types.FunctionType) and seen < 4:
        inner = cells_of(function).get("fn")
        if not callable(inner):
            return function
        if function.__module__ not in ("torch._library.custom_ops", *_DISABLED_BY):
            return function
        function, seen = inner, seen + 1
    return function


_DISABLED_BY = ("torch._compile", "torch._dynamo.eval_frame", "torch._dynamo.decorators")
