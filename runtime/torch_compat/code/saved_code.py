"""Inductor's text, kernels and graphs with fake values, as bytes; loading compiles nothing."""

import importlib.machinery
import importlib.util
import os
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.fx

from piecework.runtime.torch_compat.code.artifact import direct_entry, inductor_sources
from piecework.runtime.torch_compat.tensors import storage_id

_ADDRESS = "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR"


class Generated(NamedTuple):
    """The code that Inductor generated for a piece."""

    text: str  # the module's
    function: types.FunctionType  # what runs of it, ``call(self, args)`` or ``call(args)``


def generated_code(artifact: object, inputs: int, outputs: int) -> Generated | str:
    """The code inside an artifact with nothing to do around it; else why it can't be had."""
    call, reason = direct_entry(artifact, inputs, outputs, vouched=True)
    owner = getattr(call, "__self__", None)
    function = getattr(call, "__func__", call)
    if not isinstance(function, types.FunctionType):
        return reason or f"its code is a {type(call).__name__}"
    if owner is not None and getattr(owner, "partitions", None) != []:
        return "its code is cut into partitions"
    return Generated("".join(inductor_sources(artifact)[:1]), function)


def kernel_file(value: object) -> Path | None:
    """The shared object that a C++ kernel of Inductor's lies in; None for anything else."""
    owner = getattr(value, "__self__", None)
    if not isinstance(value, types.BuiltinFunctionType) or not isinstance(owner, types.ModuleType):
        return None
    path = getattr(owner, "__file__", None) or ""
    made = owner.__name__.endswith(".kernel") and path.endswith(".so")
    return Path(path) if made and getattr(owner, "kernel", None) is value else None


def load_kernel(data: bytes, digest: str) -> Callable[..., object]:
    """The function of a shared object of Inductor's, by way of a file that only we can reach."""
    name = f"piecework_{digest}.kernel"
    if name in sys.modules:
        return sys.modules[name].kernel  # type: ignore[no-any-return]
    address = torch._C._dynamo.guards._torchinductor_pyobject_tensor_data_ptr  # type: ignore[attr-defined]
    os.environ[_ADDRESS] = str(address)  # as torch does, which leaves it there too
    # The folder's name makes the file one that the system's loader has not met.
    with tempfile.TemporaryDirectory(prefix="piecework-") as folder:
        path = os.path.join(folder, "kernel.so")
        Path(path).write_bytes(data)
        loader = importlib.machinery.ExtensionFileLoader(name, path)
        spec = importlib.util.spec_from_file_location(name, path, loader=loader)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
    sys.modules[name] = module
    return module.kernel  # type: ignore[no-any-return]


_META = ("example_value", "val", "stack_trace", "nn_module_stack")
_VALUES = ("example_value", "val")


class _Fake(NamedTuple):
    """A fake tensor, and the memory it lies in, which torch's own writer leaves out."""

    memory: int
    elements: Any
    dtype: torch.dtype
    device: torch.device
    view: tuple[Any, ...]  # sizes, strides and offset
    parameter: bool
    requires_grad: bool


class _Sizes(NamedTuple):
    """A ``torch.Size``, which is otherwise read back as a tuple."""

    sizes: tuple[Any, ...]


def graphs_to_bytes(
    graph: torch.fx.GraphModule, split_gm: torch.fx.GraphModule, rows: tuple[object, ...]
) -> bytes | None:
    """Two graphs with their fake values, and plain data; None where this torch can't write them."""
    from torch.fx._graph_pickler import GraphPickler, Options

    nodes = _nodes(graph, split_gm)
    kept = [node.meta for node in nodes]
    memory: dict[int, int] = {}

    def written(value: object) -> object:
        if type(value) is torch.Size:
            return _Sizes(tuple(value))
        if not isinstance(value, torch.Tensor):
            plain = (int, float, bool, str, torch.SymInt, torch.SymBool, torch.SymFloat)
            if value is None or isinstance(value, plain):
                return value
            raise TypeError(type(value).__qualname__)
        if value.layout is not torch.strided or value.is_conj() or value.is_neg():
            raise TypeError("a tensor that is not strided, or a lazy view")
        elements = value.untyped_storage().nbytes() // value.element_size()
        view = tuple(value.shape), tuple(value.stride()), value.storage_offset()
        number = memory.setdefault(storage_id(value), len(memory))
        parameter = isinstance(value, torch.nn.Parameter)
        facts = value.dtype, value.device, view, parameter, value.requires_grad
        return _Fake(number, elements, *facts)

    try:
        for node in nodes:
            node.meta = {key: node.meta[key] for key in _META if key in node.meta}
            _change_values(node, written)
        data = bytes(GraphPickler.dumps((graph, split_gm, rows), Options(ops_filter=None)))
        graphs_from_bytes(data)
    except Exception:  # noqa: BLE001 - it meets any object, and raises anything
        return None
    else:
        return data
    finally:
        for node, meta in zip(nodes, kept, strict=True):
            node.meta = meta


def graphs_from_bytes(data: bytes) -> tuple[Any, ...]:
    """What `graphs_to_bytes` was given, with symbols of its own; raises whatever torch raises."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx._graph_pickler import GraphPickler
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    mode = FakeTensorMode(shape_env=ShapeEnv())
    graph, split_gm, rows = GraphPickler.loads(data, mode)  # type: ignore[misc]
    bases: dict[int, torch.Tensor] = {}

    def read(value: object) -> object:
        if isinstance(value, _Sizes):
            return torch.Size(value.sizes)
        if not isinstance(value, _Fake):
            return value
        if value.memory not in bases:
            size = (value.elements,)
            bases[value.memory] = torch.empty(size, dtype=value.dtype, device=value.device)
        base = bases[value.memory]
        if base.dtype != value.dtype:
            raise TypeError("memory that is seen as two dtypes")
        found = torch.as_strided(base, *value.view)
        if value.parameter:
            return torch.nn.Parameter(found, requires_grad=value.requires_grad)
        return found.requires_grad_(True) if value.requires_grad else found

    with mode, torch.no_grad():
        for node in _nodes(graph, split_gm):
            _change_values(node, read)
    return graph, split_gm, rows


def _nodes(*graphs: torch.fx.GraphModule) -> list[torch.fx.Node]:
    modules = (module for graph in graphs for module in graph.modules())
    found = (n for m in modules if isinstance(m, torch.fx.GraphModule) for n in m.graph.nodes)
    return list(dict.fromkeys(found))


def _change_values(node: torch.fx.Node, change: Callable[[object], object]) -> None:
    def changed(value: object) -> object:
        if type(value) in (tuple, list):
            return type(value)(map(changed, value))  # type: ignore[call-arg, call-overload]
        return change(value)

    for key in _VALUES:
        if key in node.meta:
            node.meta[key] = changed(node.meta[key])
