"""A graph that takes any number of positional and keyword arguments."""

import torch
import torch.fx


def build() -> torch.fx.GraphModule:
    graph = torch.fx.Graph()
    first = graph.placeholder("first")
    rest = graph.placeholder("*rest")
    options = graph.placeholder("**options")
    count = graph.call_function(len, (rest,))
    total = graph.call_function(torch.add, (first, count))
    given = graph.call_function(len, (options,))
    graph.output((total, given))
    return torch.fx.GraphModule(torch.nn.Module(), graph)


def inputs() -> list[tuple[object, ...]]:
    return [(torch.ones(2),), (torch.ones(2), 1, 2)]
