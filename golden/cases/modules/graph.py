"""call_module of leaf modules by dotted path; one of them is called twice."""

import torch
import torch.fx


def build() -> torch.fx.GraphModule:
    torch.manual_seed(0)
    root = torch.nn.Module()
    root.block = torch.nn.Module()
    root.block.layers = torch.nn.ModuleList([torch.nn.Linear(4, 4), torch.nn.LayerNorm(4)])
    root.act = torch.nn.GELU()
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_module("block.layers.0", (x,))
    y = graph.call_module("act", (y,))
    y = graph.call_module("block.layers.0", (), {"input": y})
    y = graph.call_module("block.layers.1", (y,))
    graph.output(y)
    return torch.fx.GraphModule(root, graph)


def inputs() -> list[tuple[object, ...]]:
    torch.manual_seed(1)
    return [(torch.randn(rows, 4),) for rows in (1, 3)]
