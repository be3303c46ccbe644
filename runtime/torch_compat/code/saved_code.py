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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.fx

from piecework.runtime.torch_compat.code.artifact import direct_entry, source_of_artifact
from piecework.runtime.torch_compat.tensors import storage_id

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

_META = ("example_value", "val", "stack_trace", "nn_module_stack")
_VALUES = ("example_value", "val")


@dataclass(frozen=True, slots=True)
class _Fake:
    """A fake tensor: what it is, and which memory it lies in. Torch's own writer leaves the latter out."""

    memory: int
    elements: object
    dtype: torch.dtype
    device: torch.device
    sizes: tuple[object, ...]
    strides: tuple[object, ...]
    offset: object
    parameter: bool
    requires_grad: bool


@dataclass(frozen=True, slots=True)
class _Sizes:
    """A ``torch.Size``, which is otherwise read back as a tuple."""

    sizes: tuple[object, ...]


_SYMBOLIC = (torch.SymInt, torch.SymBool, torch.SymFloat)


class _NotKept(Exception):
    """A value that can't be written down."""


def graphs_to_bytes(
    value: tuple[object, ...], graphs: Sequence[torch.fx.GraphModule]
) -> bytes | None:
    """Graphs with their fake values as bytes; None where this torch can't write them, or reads something else back.

    Args:
        value: what is written, with ``graphs`` in it.
    """
    from torch.fx._graph_pickler import GraphPickler, Options

    nodes = _nodes(graphs)
    kept = [node.meta for node in nodes]
    memory: dict[int, int] = {}
    try:
        for node in nodes:
            node.meta = {key: node.meta[key] for key in _META if key in node.meta}
            for key in _VALUES:
                if key in node.meta:
                    node.meta[key] = _mapped(node.meta[key], lambda each: _written(each, memory))
        data = bytes(GraphPickler.dumps((value, tuple(graphs)), Options(ops_filter=None)))
        again = _nodes(graphs_from_bytes(data)[1])  # type: ignore[arg-type]
        same = [_text(node.meta) for node in again] == [_text(meta) for meta in kept]
        return data if same and _memories(n.meta for n in again) == _memories(kept) else None
    except Exception:  # noqa: BLE001 - it meets any object, and raises anything
        return None
    finally:
        for node, meta in zip(nodes, kept, strict=True):
            node.meta = meta


def graphs_from_bytes(data: bytes) -> tuple[object, ...]:
    """What `graphs_to_bytes` wrote, and the graphs in it, in a world of symbols of its own; raises whatever torch raises."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx._graph_pickler import GraphPickler
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    mode = FakeTensorMode(shape_env=ShapeEnv())
    value, graphs = GraphPickler.loads(data, mode)  # type: ignore[misc]
    bases: dict[int, torch.Tensor] = {}
    with mode, torch.no_grad():
        for node in _nodes(graphs):
            for key in _VALUES:
                if key in node.meta:
                    node.meta[key] = _mapped(node.meta[key], lambda each: _read(each, bases))
    return value, graphs


def _nodes(graphs: Sequence[torch.fx.GraphModule]) -> list[torch.fx.Node]:
    modules = (module for graph in graphs for module in graph.modules())
    found = (n for m in modules if isinstance(m, torch.fx.GraphModule) for n in m.graph.nodes)
    return list(dict.fromkeys(found))


def _mapped(value: object, change: Callable[[object], object]) -> object:
    if type(value) in (tuple, list):
        return type(value)(_mapped(each, change) for each in value)  # type: ignore[call-arg, attr-defined]
    return change(value)


def _written(value: object, memory: dict[int, int]) -> object:
    if not isinstance(value, torch.Tensor):
        if value is None or isinstance(value, (int, float, bool, str, *_SYMBOLIC)):
            return value
        if type(value) is torch.Size:
            return _Sizes(tuple(value))
        raise _NotKept(type(value).__qualname__)
    if value.layout is not torch.strided or value.is_conj() or value.is_neg():
        raise _NotKept
    store = storage_id(value)
    number = memory.setdefault(store, len(memory))
    return _Fake(
        number,
        value.untyped_storage().nbytes() // value.element_size(),
        value.dtype,
        value.device,
        tuple(value.shape),
        tuple(value.stride()),
        value.storage_offset(),
        isinstance(value, torch.nn.Parameter),
        value.requires_grad,
    )


def _read(value: object, bases: dict[int, torch.Tensor]) -> object:
    if isinstance(value, _Sizes):
        return torch.Size(value.sizes)  # type: ignore[arg-type]
    if not isinstance(value, _Fake):
        return value
    base = bases.get(value.memory)
    if base is None:
        base = torch.empty((value.elements,), dtype=value.dtype, device=value.device)  # type: ignore[call-overload]
        bases[value.memory] = base
    if base.dtype != value.dtype:
        raise _NotKept
    found = torch.as_strided(base, value.sizes, value.strides, value.offset)  # type: ignore[arg-type]
    if value.parameter:
        return torch.nn.Parameter(found, requires_grad=value.requires_grad)
    return found.requires_grad_(True) if value.requires_grad else found


def _text(meta: Mapping[str, object]) -> str:
    """What the values of a node are, with the names of symbols."""
    return repr([_mapped(meta.get(key), _value_text) for key in _VALUES])


def _value_text(value: object) -> object:
    if not isinstance(value, torch.Tensor):
        return repr(value)
    kind = isinstance(value, torch.nn.Parameter), value.requires_grad, value.dtype, value.device
    return repr((kind, tuple(value.shape), value.stride(), value.storage_offset()))


def _memories(metas: Iterable[Mapping[str, object]]) -> list[int]:
    """The memory of every tensor, numbered in order of first use."""
    numbers: dict[int, int] = {}
    found: list[int] = []

    def note(value: object) -> None:
        if isinstance(value, torch.Tensor):
            found.append(numbers.setdefault(storage_id(value), len(numbers)))

    for meta in metas:
        for key in _VALUES:
            _mapped(meta.get(key), note)
    return found
