"""Graph modules that call graph modules, each a function, callees first; leaves in them by dotted path, one called by keyword."""

import operator

import torch
import torch.fx


def _inner() -> torch.fx.GraphModule:
    graph = torch.fx.Graph()
    a = graph.placeholder("a")
    b = graph.placeholder("b")
    s = graph.call_function(torch.add, (a, b))
    d = graph.call_function(torch.sub, (a, b))
    graph.output((s, d))
    return torch.fx.GraphModule(torch.nn.Module(), graph)


def _outer(inner: torch.fx.GraphModule) -> torch.fx.GraphModule:
    root = torch.nn.Module()
    root.inner = inner
    root.act = torch.nn.ReLU()
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    pair = graph.call_module("inner", (x,), {"b": 1})
    s = graph.call_function(operator.getitem, (pair, 0))
    d = graph.call_function(operator.getitem, (pair, 1))
    active = graph.call_module("act", (), {"input": d})
    graph.output([s, active])
    return torch.fx.GraphModule(root, graph)


def build() -> torch.fx.GraphModule:
    root = torch.nn.Module()
    root.outer = _outer(_inner())
    root.other = _outer(_inner())
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    one = graph.call_module("outer", (x,))
    two = graph.call_module("outer", (x,))
    three = graph.call_module("other", (x,))
    graph.output((one, two, three))
    return torch.fx.GraphModule(root, graph)


def inputs() -> list[tuple[object, ...]]:
    return [(torch.arange(3.0),)]
