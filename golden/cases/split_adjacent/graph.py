"""Two cut operators next to each other share a submodule, which both layers share as one function."""

import torch
import torch.fx
from piecework.codegen import LowerOptions, split_graph
from torch.fx.passes.fake_tensor_prop import FakeTensorProp


def build() -> torch.fx.GraphModule:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    for number in range(2):
        q = graph.call_function(torch.sin, (x,))
        a = graph.call_function(torch.ops.aten.cumsum.default, (q, number))
        b = graph.call_function(torch.ops.aten.cumsum.default, (a, 0), {"dtype": torch.float32})
        x = graph.call_function(torch.add, (x, b))
    graph.output((x,))
    gm = torch.fx.GraphModule(torch.nn.Module(), graph)
    FakeTensorProp(gm).propagate(torch.empty(2, 4))
    return split_graph(gm, ["aten::cumsum"])[0]


def options() -> LowerOptions:
    return LowerOptions(submods=["submod_0", "submod_2", "submod_4"])


def inputs() -> list[tuple[object, ...]]:
    torch.manual_seed(0)
    return [(torch.randn(rows, 4),) for rows in (1, 3)]
