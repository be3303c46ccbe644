"""call_method on values, on a literal and on a constant; a method that changes its receiver."""

import torch
import torch.fx


def build() -> torch.fx.GraphModule:
    root = torch.nn.Module()
    root.register_buffer("table", torch.arange(6.0).reshape(2, 3))
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    table = graph.get_attr("table")
    row = graph.call_method("select", (table, 0, 1))
    y = graph.call_method("clone", (x,))
    graph.call_method("add_", (y, row), {"alpha": 2})
    view = graph.call_method("view", (y, -1))
    graph.call_method("mul_", (view, 3))
    upper = graph.call_method("upper", ("name",))
    graph.output((y, view, upper))
    return torch.fx.GraphModule(root, graph)


def inputs() -> list[tuple[object, ...]]:
    return [(torch.ones(2, 3),), (torch.zeros(4, 3),)]
