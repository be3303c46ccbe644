"""Values that an artifact may hold. In: plans, facts and constants of a compilation. Out: bytes, and the same values in another process.

It is an allow-list: what is not known to mean the same in another process is refused when it is saved. Bytes are verified before they come here.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import importlib
import io
import pickle
import types
from typing import Any

import torch
from torch._ops import OpOverload, OpOverloadPacket
from torch.utils import _pytree as pytree

from piecework.codegen.graph.targets import function_path
from piecework.errors import ArtifactError

_TORCHS = (torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size)
# Containers, whose parts are asked in turn; a partial function is one of a function and arguments.
_BUILTIN = (
    *(complex, slice, range, type(...), frozenset),
    *(types.MappingProxyType, functools.partial),
)
MAX_TENSOR = 1 << 16
_HINT = (
    "leave it out of what the model computes from constants, or compile the model in each process"
)


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, where: str) -> None:
        super().__init__(file, protocol=5)
        self._where = where

    def persistent_id(self, value: Any) -> Any:
        if isinstance(value, (OpOverload, OpOverloadPacket)):
            return "operator", str(value)
        if isinstance(value, torch.Tensor):
            return "tensor", _tensor_parts(value, self._where)
        if isinstance(value, types.ModuleType):
            return "module", value.__name__
        return None

    def reducer_override(self, value: Any) -> Any:
        kind = type(value)
        if isinstance(value, type) or kind in (types.FunctionType, types.BuiltinFunctionType):
            if kind is types.BuiltinFunctionType and not isinstance(
                value.__self__, types.ModuleType
            ):
                path = function_path(value)
                if path is not None:
                    return _resolve, (path.module or "builtins", path.path)
            return NotImplemented  # by its name, which must lead to the very same object
        if kind in _TORCHS or kind in _BUILTIN or isinstance(value, enum.Enum):
            return NotImplemented
        if issubclass(kind, pytree.TreeSpec):
            return NotImplemented
        if kind.__module__.startswith("piecework.") and dataclasses.is_dataclass(kind):
            return NotImplemented  # a plan; its parts are asked in turn
        raise ArtifactError(
            f"a {kind.__module__}.{kind.__qualname__} can't be saved: nothing says that it means the same in another process",
            where=self._where,
            hint=_HINT,
        )


def to_bytes(value: object, where: str) -> bytes:
    """``value`` as bytes.

    Args:
        where: what it is, for errors.

    Raises:
        ArtifactError: something in it is not on the allow-list.
    """
    file = io.BytesIO()
    try:
        _Pickler(file, where).dump(value)
    except ArtifactError:
        raise
    except (pickle.PicklingError, AttributeError, TypeError, RecursionError) as error:
        raise ArtifactError(
            f"it can't be saved: {error}",
            where=where,
            hint="classes and functions must be found by their names in a module that can be imported",
        ) from error
    return file.getvalue()


class _Unpickler(pickle.Unpickler):
    def persistent_load(self, pid: Any) -> Any:
        kind, what = pid
        if kind == "operator":
            return operator_named(what)
        if kind == "tensor":
            return _tensor_of(*what)
        return importlib.import_module(what)


def from_bytes(data: bytes, where: str) -> object:
    """What `to_bytes` wrote.

    Raises:
        ArtifactError: it names a class, function or operator that is not here.
    """
    try:
        return _Unpickler(io.BytesIO(data)).load()
    except ArtifactError:
        raise
    except Exception as error:
        raise ArtifactError(
            f"it names something that is not here: {error}",
            where=where,
            hint="import what the saved model used, by the same names",
        ) from error


def operator_named(name: str) -> object:
    """The operator ``ns.op`` or ``ns.op.overload``.

    Raises:
        ArtifactError: it is not registered.
    """
    found: Any = torch.ops
    try:
        for part in name.split("."):
            found = getattr(found, part)
    except (AttributeError, RuntimeError) as error:
        raise ArtifactError(
            f"operator {name} is not registered",
            where=name,
            hint="import the module that defines it before the artifact is loaded",
        ) from error
    return found


def _resolve(module: str, path: str) -> object:
    value: Any = importlib.import_module(module)
    for part in path.split(".")[1 if module != "builtins" else 0 :]:
        value = getattr(value, part)
    return value


def _tensor_parts(tensor: torch.Tensor, where: str) -> tuple[Any, ...]:
    """A small tensor of the graph's own, such as a name as bytes."""
    plain = type(tensor) is torch.Tensor and tensor.layout is torch.strided
    if not (plain and tensor.device.type == "cpu" and tensor.is_contiguous()):
        raise _no_weights(tensor, where)
    if tensor.requires_grad or tensor.nbytes > MAX_TENSOR:
        raise _no_weights(tensor, where)
    raw = tensor.reshape(-1).view(torch.uint8) if tensor.numel() else tensor.new_empty(0)
    return bytes(raw.tolist()) if tensor.numel() else b"", tensor.dtype, tuple(tensor.shape)


def _no_weights(tensor: torch.Tensor, where: str) -> ArtifactError:
    return ArtifactError(
        f"the graph holds a tensor of its own ({tuple(tensor.shape)}, {tensor.dtype}), and an artifact holds no weights",
        where=where,
        hint="register it as a buffer of the model",
    )


def _tensor_of(data: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape)
