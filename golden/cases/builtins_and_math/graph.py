"""Builtins and `math`, next to torch functions of the same name."""

import math
import operator

import torch
import torch.fx


def build() -> torch.fx.GraphModule:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    n = graph.placeholder("n")
    size = graph.call_function(len, (x,))
    root = graph.call_function(math.sqrt, (n,))
    rounded = graph.call_function(round, (root, 2))
    top = graph.call_function(max, (n, size, 3))
    torch_top = graph.call_function(torch.max, (x,))
    whole = graph.call_function(math.floor, (rounded,))
    positive = graph.call_function(abs, (-3,))
    truth = graph.call_function(bool, (n,))
    piece = graph.call_function(slice, (0, top))
    part = graph.call_function(operator.getitem, (x, piece))
    graph.output((size, rounded, top, torch_top, whole, positive, truth, part))
    return torch.fx.GraphModule(torch.nn.Module(), graph)


def inputs() -> list[tuple[object, ...]]:
    return [(torch.arange(5.0), 2), (torch.arange(2.0), 30)]
