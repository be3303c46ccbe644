"""The private corners of torch that piecework uses: in, plain values; out, what torch makes of them.

It never patches torch; each function probes for what it needs and falls back to a public way.
"""

from __future__ import annotations

import contextlib
import ctypes
import inspect
from collections.abc import Callable

import torch
from torch.utils import _pytree


def storage_at(pointer: int, device: torch.device, nbytes: int) -> torch.UntypedStorage:
    """A storage over memory that it does not own.

    The caller answers for the memory being there whenever the storage is read.

    Args:
        pointer: the address of the first byte; not zero.
        device: where the memory is, with its index on CUDA.
        nbytes: its length in bytes, more than zero.
    """
    construct = getattr(torch._C, "_construct_storage_from_data_pointer", None)
    if construct is not None:
        return construct(pointer, device, nbytes)
    return _public_storage_at(pointer, device, nbytes)


def _public_storage_at(pointer: int, device: torch.device, nbytes: int) -> torch.UntypedStorage:
    """The fall-back of ``storage_at`` by the buffer protocol (CPU) or the CUDA array interface."""
    if device.type == "cpu":
        window = (ctypes.c_char * nbytes).from_address(pointer)
        return torch.frombuffer(window, dtype=torch.uint8).untyped_storage()
    return torch.as_tensor(_CudaBytes(pointer, nbytes), device=device).untyped_storage()


class _CudaBytes:
    """Device memory as bytes, in the form of the CUDA array interface."""

    def __init__(self, pointer: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (pointer, False),
            "strides": None,
            "version": 3,
        }


def negative_view(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` seen with its sign turned, without a copy where torch has such a view."""
    view = getattr(torch, "_neg_view", None)
    return -tensor if view is None else view(tensor)


def flatten_tree(tree: object) -> tuple[list[object], _pytree.TreeSpec]:
    """The leaves of nested containers in order, and what puts them together again."""
    return _pytree.tree_flatten(tree)


def unflatten_tree(leaves: list[object], spec: _pytree.TreeSpec) -> object:
    """The containers of ``spec`` around ``leaves``."""
    return _pytree.tree_unflatten(leaves, spec)


def mark_unbacked(tensor: torch.Tensor, dim: int, *, shape_id: str | None = None) -> None:
    """Declare dimension ``dim`` of an example input unbacked: captured for every size, zero and one included.

    Args:
        shape_id: dimensions with one id become one symbol; where torch can't say so, they stay two symbols and the
            captured graph checks at run time that they are equal.
    """
    mark = torch._dynamo.decorators.mark_unbacked
    if shape_id is not None and "shape_id" in inspect.signature(mark).parameters:
        mark(tensor, dim, shape_id=shape_id)
    else:
        mark(tensor, dim)


def standalone_compile(
    graph: torch.fx.GraphModule,
    example_inputs: list[object],
    *,
    dynamic_shapes: str,
    config_patches: dict[str, object],
) -> Callable[..., object]:
    """Compile a flat graph with Inductor into an artifact of its own (``torch._inductor.standalone_compile``).

    Args:
        dynamic_shapes: ``"from_tracing_context"`` keeps the symbols of the capture, ``"from_example_inputs"`` takes
            sizes as they are.
    """
    from torch._inductor import standalone_compile as compile_one

    return compile_one(
        graph,
        example_inputs,
        dynamic_shapes=dynamic_shapes,
        options={"config_patches": config_patches},
    )


def inductor_key() -> str:
    """A digest of the installed Inductor's sources; torch's version where there is none."""
    try:
        from torch._inductor.codecache import torch_key
    except ImportError:
        return str(torch.__version__)
    return torch_key().hex()


def tracing_context() -> object:
    """Dynamo's tracing context while a backend runs; None outside."""
    return torch._guards.TracingContext.try_get()


def placeholder_source(node: torch.fx.Node) -> str:
    """Dynamo's name of where a graph input comes from, such as ``L['x'].size()[0]``; "" when unknown."""
    source = getattr(node.meta.get("grapharg"), "source", None)
    name = getattr(source, "name", "")
    return name() if callable(name) else str(name)


def dynamo_failure(error: BaseException) -> bool:
    """Whether Dynamo raised ``error`` because it could not capture the code."""
    return isinstance(error, torch._dynamo.exc.TorchDynamoException)


def backend_failure(error: BaseException) -> Exception | None:
    """The exception that a Dynamo backend raised and Dynamo wrapped, if ``error`` is such a wrapper."""
    if isinstance(error, torch._dynamo.exc.BackendCompilerFailed):
        return error.inner_exception
    return None


def symbol_of(size: object) -> str | None:
    """The expression of a size that is still symbolic; None for a number, also one that the trace fixed."""
    if not isinstance(size, torch.SymInt):
        return None
    expr = size.node.expr
    return None if expr.is_number else str(expr)


def with_symbol(value: object, symbol: str, size: int) -> object:
    """``value`` (a size or a fake tensor) with ``symbol`` replaced by ``size`` in every expression.

    Sizes without a symbol left become plain integers; strides and storage offset are kept.
    """
    if isinstance(value, torch.SymInt):
        return _size_with(value, symbol, size)
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        return value
    sizes = [_size_with(each, symbol, size) for each in value.shape]
    strides = [_size_with(each, symbol, size) for each in value.stride()]
    offset = _size_with(value.storage_offset(), symbol, size)
    fixed = all(
        a is b for a, b in zip((*sizes, *strides), (*value.shape, *value.stride()), strict=True)
    )
    if fixed:
        return value
    empty = any(type(each) is int and each == 0 for each in sizes)
    reach = 0 if empty else 1 + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True))
    fake_mode = getattr(value, "fake_mode", None)
    with contextlib.nullcontext() if fake_mode is None else fake_mode:
        storage = torch.empty(offset + reach, dtype=value.dtype, device=value.device)
        return storage.as_strided(sizes, strides, offset)


def _size_with(value: object, symbol: str, size: int) -> object:
    if not isinstance(value, torch.SymInt):
        return value
    expr = value.node.expr
    replaced = expr.subs({each: size for each in expr.free_symbols if str(each) == symbol})
    if replaced.is_number:
        return int(replaced)
    if replaced == expr:
        return value
    return value.node.shape_env.create_symintnode(replaced, hint=None)
