"""The CUDA graphs of torch 2.15 as they are, over the fake driver. In: nothing. Out: a `FakeCuda` below torch's own ``CUDAGraph`` and its recorder of marks."""

from __future__ import annotations

import importlib
import types

import pytest
import torch
from fake_cuda import Driver, FakeCuda

HOOKS = ("register_capture_start_hook", "register_capture_end_hook")
newer = pytest.mark.skipif(
    not all(hasattr(torch.cuda.CUDAGraph, name) for name in HOOKS), reason="needs torch 2.15"
)


class SplitDriver(Driver):
    """``torch._C._CUDAGraph`` of torch 2.15, which is told of each step of a capture's end."""

    def __new__(cls, keep_graph: bool = False):
        return object.__new__(cls)

    def __init__(self, keep_graph: bool = False) -> None:
        super().__init__(keep_graph)
        self.exec_id: int | None = None

    def capture_end_pre(self) -> None:
        Driver.capture_end(self)

    def instantiate(self) -> None:
        self.exec_id = self.cuda.next_id()

    def capture_end_post(self) -> None:
        assert self.exec_id is not None, "replayed before it is instantiated"

    def raw_cuda_graph_exec(self) -> int:
        return self.exec_id

    @property
    def _has_graph_exec(self) -> bool:
        return self.exec_id is not None

    def reset(self) -> None:
        super().reset()
        self.exec_id = None


class Runtime:
    """What torch's recorder asks of ``cuda.bindings``: a graph is a chain of nodes, in the order of their capture."""

    def __init__(self, cuda: FakeCuda, runtime, driver) -> None:
        self.cuda = cuda
        self.cudaError_t = runtime.cudaError_t
        self.cudaStreamCaptureStatus = runtime.cudaStreamCaptureStatus
        self.CUgraphNodeType = driver.CUgraphNodeType
        self.done, self.found = runtime.cudaError_t.cudaSuccess, driver.CUresult.CUDA_SUCCESS

    def cudaStreamGetCaptureInfo(self, stream: int):
        graph = self.cuda.capturing
        if graph is None or graph.stream.cuda_stream != stream:
            return self.done, self.cudaStreamCaptureStatus(0), 0, 0, [], [], 0
        last = [graph.number << 32 | len(graph.work) - 1] if graph.work else []
        return self.done, self.cudaStreamCaptureStatus(1), 0, graph.number, last, [], len(last)

    def cudaGraphGetId(self, graph: int):
        return self.done, graph

    def cudaGraphExecGetId(self, graph: int):
        return self.done, graph

    def cudaGraphGetRootNodes(self, graph: int, pNumRootNodes: int = 0):
        roots = [graph << 32] if self.cuda.capturing.work else []
        return self.done, roots, len(roots)

    def cudaGraphNodeGetDependentNodes(self, node: int, pNumDependentNodes: int = 0):
        last = (node & 0xFFFFFFFF) + 1 == len(self.cuda.capturing.work)
        after = [] if last else [node + 1]
        return self.done, after, [], len(after)

    def cudaGraphNodeGetToolsId(self, node: int):
        return (self.done, node) if node else (self.cudaError_t.cudaErrorInvalidValue, None)

    def cuGraphNodeGetType(self, node: int):
        return self.found, self.CUgraphNodeType.CU_GRAPH_NODE_TYPE_KERNEL


class RealGraphs(FakeCuda):
    """The fake, below the graphs and the recorder of torch 2.15 as they are."""

    def __init__(self) -> None:
        super().__init__("2.15")

    def graph_class(self) -> type:
        driver = type("_CUDAGraph", (SplitDriver,), {"cuda": self})
        return over(torch.cuda.CUDAGraph, driver)

    def install_recorder(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real = importlib.import_module("torch.cuda._graph_annotations")
        bindings = Runtime(self, real._cuda_runtime, real._cuda_driver)
        monkeypatch.setattr(real, "_cuda_runtime", bindings)
        monkeypatch.setattr(real, "_cuda_driver", bindings)
        monkeypatch.setattr(real, "_tools_id_available", None)
        monkeypatch.setattr(real, "_ANNOTATABLE_TYPES", None)


def over(made: type, base: type) -> type:
    """A copy of the class ``made`` whose base is ``base``; ``super()`` in its methods goes there."""
    body = {k: v for k, v in vars(made).items() if k not in ("__dict__", "__weakref__")}
    found = type(made.__name__, (base,), {})
    for name, value in body.items():
        function = value.__func__ if isinstance(value, staticmethod) else value
        if isinstance(function, types.FunctionType) and function.__closure__ is not None:
            held = zip(function.__code__.co_freevars, function.__closure__, strict=True)
            cells = tuple(
                types.CellType(found if name == "__class__" else cell.cell_contents)
                for name, cell in held
            )
            code, namespace = function.__code__, function.__globals__
            again = types.FunctionType(code, namespace, name, function.__defaults__, cells)
            again.__kwdefaults__ = function.__kwdefaults__
            value = staticmethod(again) if isinstance(value, staticmethod) else again
        setattr(found, name, value)
    return found
