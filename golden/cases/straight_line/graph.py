"""Torch functions called by path, one after the other, and a result that nobody uses."""

import torch
import torch.fx


def build() -> torch.fx.GraphModule:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    weight = graph.placeholder("weight")
    hidden = graph.call_function(torch.nn.functional.linear, (x, weight))
    active = graph.call_function(torch.relu, (hidden,))
    graph.call_function(torch.sigmoid, (active,))
    scaled = graph.call_function(torch.mul, (active,), {"other": 0.5})
    graph.output(scaled)
    return torch.fx.GraphModule(torch.nn.Module(), graph)


def inputs() -> list[tuple[object, ...]]:
    torch.manual_seed(0)
    return [(torch.randn(rows, 4), torch.randn(3, 4)) for rows in (1, 5)]
