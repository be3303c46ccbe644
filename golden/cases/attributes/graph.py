"""get_attr of a parameter, a buffer, a dotted path and a plain value; the same one read twice."""

import torch
import torch.fx


def build() -> torch.fx.GraphModule:
    torch.manual_seed(0)
    root = torch.nn.Module()
    root.scale = torch.nn.Parameter(torch.randn(4))
    root.register_buffer("offset", torch.arange(4.0))
    root.inner = torch.nn.Module()
    root.inner.linear = torch.nn.Linear(4, 4)
    root.epsilon = 1e-6
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    scale = graph.get_attr("scale")
    offset = graph.get_attr("offset")
    weight = graph.get_attr("inner.linear.weight")
    epsilon = graph.get_attr("epsilon")
    again = graph.get_attr("scale")
    y = graph.call_function(torch.addcmul, (offset, x, scale))
    y = graph.call_function(torch.nn.functional.linear, (y, weight))
    y = graph.call_function(torch.add, (y, epsilon))
    shape = graph.call_function(getattr, (again, "shape"))
    graph.output((y, shape))
    return torch.fx.GraphModule(root, graph)


def inputs() -> list[tuple[object, ...]]:
    torch.manual_seed(1)
    return [(torch.randn(2, 4),)]
