"""No placeholder and nothing but a None to return; the call in between still happens."""

import torch
import torch.fx


def build() -> torch.fx.GraphModule:
    root = torch.nn.Module()
    root.register_buffer("steps", torch.zeros(1))
    graph = torch.fx.Graph()
    steps = graph.get_attr("steps")
    graph.call_method("add_", (steps, 1))
    graph.output(None)
    return torch.fx.GraphModule(root, graph)


def inputs() -> list[tuple[object, ...]]:
    return [()]
