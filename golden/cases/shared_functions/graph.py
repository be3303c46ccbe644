"""Equal submodules become one function; literals in which they differ become its parameters."""

import operator

import torch
import torch.fx


def _layer(number: int, chunks: int, name: str) -> torch.fx.GraphModule:
    graph = torch.fx.Graph()
    x = graph.placeholder(name)
    y = graph.call_function(torch.mul, (x, float(number)))
    parts = graph.call_method("chunk", (y, chunks), {"dim": 0})
    parts.meta["example_value"] = tuple(torch.empty(12 // chunks) for _ in range(chunks))
    first = graph.call_function(operator.getitem, (parts, 0))
    z = graph.call_function(torch.full_like, (x, number))
    w = graph.call_function(torch.add, (z, True), {"alpha": 2})
    graph.output((first, w))
    return torch.fx.GraphModule(torch.nn.Module(), graph)


def build() -> torch.fx.GraphModule:
    root = torch.nn.Module()
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    results = []
    for number, chunks in enumerate((2, 2, 3, 2)):
        root.add_module(f"layer_{number}", _layer(number, chunks, f"x_{number}"))
        call = graph.call_module(f"layer_{number}", (x,))
        results.append(graph.call_function(operator.getitem, (call, 0)))
        x = graph.call_function(operator.getitem, (call, 1))
    graph.output((x, results))
    return torch.fx.GraphModule(root, graph)


def inputs() -> list[tuple[object, ...]]:
    return [(torch.arange(12.0),)]
