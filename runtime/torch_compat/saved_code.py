"""Compiled code that leaves the process. In: an Inductor artifact, or bytes of a kernel or a graph. Out: the text and the values that its code runs on; a kernel or a graph again.

Loading imports no Inductor and compiles nothing.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
import tempfile
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from piecework.runtime.torch_compat.artifact import direct_entry, source_of_artifact

_ADDRESS = "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR"
_ENTRY = "kernel"


@dataclass(frozen=True, slots=True)
class Generated:
    """The code that Inductor generated for a piece.

    Attributes:
        text: the module's text.
        function: what runs, ``call(self, args)`` or ``call(args)``.
        values: the module's globals.
    """

    text: str
    function: types.FunctionType
    values: Mapping[str, object]


def generated_code(artifact: object, inputs: int, outputs: int) -> Generated | str:
    """The code inside an artifact that `direct_entry` found nothing around; else why it can't be had."""
    call, reason = direct_entry(artifact, inputs, outputs, vouched=True)
    if call is None:
        return reason
    owner = getattr(call, "__self__", None)
    function = getattr(call, "__func__", call)
    if not isinstance(function, types.FunctionType):
        return f"its code is a {type(call).__name__}"
    if owner is not None and getattr(owner, "partitions", None) != []:
        return "its code is cut into partitions"
    return Generated(source_of_artifact(artifact), function, function.__globals__)


def kernel_file(value: object) -> Path | None:
    """The shared object that a C++ kernel of Inductor's lies in; None for anything else."""
    owner = getattr(value, "__self__", None)
    if not isinstance(value, types.BuiltinFunctionType) or not isinstance(owner, types.ModuleType):
        return None
    path = getattr(owner, "__file__", None) or ""
    made = owner.__name__.endswith(f".{_ENTRY}") and path.endswith(".so")
    return Path(path) if made and getattr(owner, _ENTRY, None) is value else None


def load_kernel(data: bytes, digest: str) -> Callable[..., object]:
    """The function of a shared object of Inductor's, from exactly these bytes.

    Raises:
        ImportError, OSError: the system can't load it, or this torch has no such kernels.
    """
    address = getattr(
        torch._C._dynamo.guards, "_torchinductor_pyobject_tensor_data_ptr", None  # type: ignore[attr-defined]
    )
    if address is None:
        raise ImportError("this torch has no kernels that take tensors from Python")
    name = f"piecework_{digest}.{_ENTRY}"
    held = sys.modules.get(name)
    if held is not None:
        return held.kernel  # type: ignore[no-any-return]
    before = os.environ.get(_ADDRESS)
    os.environ[_ADDRESS] = str(address)
    try:
        module = _from_private_copy(name, data)
    finally:
        if before is None:
            del os.environ[_ADDRESS]
        else:
            os.environ[_ADDRESS] = before
    sys.modules[name] = module
    return module.kernel  # type: ignore[no-any-return]


def _from_private_copy(name: str, data: bytes) -> types.ModuleType:
    """A module of these bytes, from a file that nobody else can reach: what was verified is what is loaded."""
    with tempfile.TemporaryDirectory(prefix="piecework-") as folder:
        path = os.path.join(
            folder, "kernel.so"
        )  # the folder's name makes it one that the system's loader has not met
        with open(path, "wb") as file:
            file.write(data)
        return _from_file(name, path)


def _from_file(name: str, path: str) -> types.ModuleType:
    loader = importlib.machinery.ExtensionFileLoader(name, path)
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


# --- graphs ------------------------------------------------------------------------------------------


def graphs_to_bytes(value: object) -> bytes | None:
    """Graphs with their fake values as bytes; None where this torch can't write them, or something in them."""
    try:
        from torch.fx._graph_pickler import GraphPickler, Options
    except ImportError:
        return None
    try:
        return bytes(GraphPickler.dumps(value, Options(ops_filter=None)))
    except Exception:  # noqa: BLE001 - it meets any object, and raises anything
        return None


def graphs_from_bytes(data: bytes) -> object:
    """What `graphs_to_bytes` wrote, in a world of symbols of its own; raises whatever torch raises."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx._graph_pickler import GraphPickler
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    return GraphPickler.loads(data, FakeTensorMode(shape_env=ShapeEnv()))
