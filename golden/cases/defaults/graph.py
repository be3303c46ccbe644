"""Placeholders with defaults, one of which has no literal."""

import torch
import torch.fx


def build() -> torch.fx.GraphModule:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    scale = graph.placeholder("scale", default_value=2.0)
    dtype = graph.placeholder("dtype", default_value=torch.float64)
    bias = graph.placeholder("bias", default_value=None)
    y = graph.call_function(torch.mul, (x, scale))
    y = graph.call_method("to", (y, dtype))
    graph.output((y, bias))
    return torch.fx.GraphModule(torch.nn.Module(), graph)


def inputs() -> list[tuple[object, ...]]:
    x = torch.arange(3.0)
    return [(x,), (x, 3), (x, -1, torch.float32, "bias")]
