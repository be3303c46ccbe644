"""The values that an artifact may hold, as bytes: those that mean the same in another process."""

import dataclasses
import enum
import functools
import importlib
import io
import pickle
import pkgutil
import types
from typing import Any

import torch
from torch._ops import OpOverload, OpOverloadPacket
from torch.utils import _pytree as pytree

from piecework.codegen.graph.targets import function_path
from piecework.errors import ArtifactError

#: What pickle writes as it is; of containers the parts are asked in turn.
_KINDS = (
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size),
    *(complex, slice, range, type(...), frozenset, types.MappingProxyType, functools.partial),
)
MAX_TENSOR = 1 << 16


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        if isinstance(value, (OpOverload, OpOverloadPacket)):
            return "operator", str(value)
        if isinstance(value, types.ModuleType):
            return "module", value.__name__
        return None

    def reducer_override(self, value: Any) -> Any:
        kind = type(value)
        owner = getattr(value, "__self__", None)
        if kind is torch.Tensor:
            return _tensor_of, _tensor_parts(value)
        if kind is types.BuiltinFunctionType and not isinstance(owner, types.ModuleType):
            path = function_path(value)
            if path is None:
                return NotImplemented
            module = path.module or "builtins"
            return pkgutil.resolve_name, (f"{module}:{path.path.removeprefix(f'{module}.')}",)
        by_name = isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType))
        ours = kind.__module__.startswith("piecework.")
        plan = ours and (dataclasses.is_dataclass(kind) or issubclass(kind, tuple))
        if by_name or plan or kind in _KINDS or isinstance(value, (enum.Enum, pytree.TreeSpec)):
            return NotImplemented  # as pickle does; parts are asked in turn
        raise TypeError(
            f"a {kind.__module__}.{kind.__qualname__} may mean another in another process"
        )


def to_bytes(value: object, where: str) -> bytes:
    """``value`` as bytes."""
    file = io.BytesIO()
    try:
        _Pickler(file, protocol=5).dump(value)
    except (pickle.PicklingError, AttributeError, TypeError, RecursionError) as error:
        hint = "keep tensors in buffers, and classes and functions in modules that can be imported"
        raise ArtifactError(f"it can't be saved: {error}", where=where, hint=hint) from error
    return file.getvalue()


class _Unpickler(pickle.Unpickler):
    def persistent_load(self, pid: Any) -> Any:
        kind, name = pid
        return operator_named(name) if kind == "operator" else importlib.import_module(name)


def from_bytes(data: bytes, where: str) -> object:
    """What `to_bytes` wrote."""
    try:
        return _Unpickler(io.BytesIO(data)).load()
    except ArtifactError:
        raise
    except Exception as error:
        hint = "import what the saved model used, by the same names"
        why = f"it names something that is not here: {error}"
        raise ArtifactError(why, where=where, hint=hint) from error


def operator_named(name: str) -> object:
    """The operator ``ns.op`` or ``ns.op.overload``; `ArtifactError` if it is not registered."""
    try:
        return functools.reduce(getattr, name.split("."), torch.ops)
    except (AttributeError, RuntimeError) as error:
        hint = "import the module that defines it before the artifact is loaded"
        raise ArtifactError(f"operator {name} is not registered", hint=hint) from error


def _tensor_parts(tensor: torch.Tensor) -> tuple[Any, ...]:
    """A small tensor of the graph's own, such as a name as bytes."""
    here = tensor.device.type == "cpu" and tensor.is_contiguous()
    if not here or tensor.requires_grad or tensor.nbytes > MAX_TENSOR:
        what = f"{tuple(tensor.shape)}, {tensor.dtype}"
        raise TypeError(f"the graph holds a tensor of its own ({what}), and no weight is saved")
    return tensor.reshape(-1).tolist(), tensor.dtype, tuple(tensor.shape)


def _tensor_of(values: list[Any], dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype).reshape(shape)
