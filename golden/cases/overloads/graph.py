"""Operators as overload and as packet; the default overload; keyword-only arguments."""

import torch
import torch.fx


def build() -> torch.fx.GraphModule:
    aten = torch.ops.aten
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(aten.add.Tensor, (x, x), {"alpha": 2})
    y = graph.call_function(aten.relu.default, (y,))
    y = graph.call_function(aten.mul, (y, 2))
    size = graph.call_function(aten.sym_size.int, (x, 0))
    ones = graph.call_function(aten.ones.default, ([size, 2],), {"dtype": torch.float32})
    y = graph.call_function(aten.mm.default, (y, ones))
    graph.output((y,))
    return torch.fx.GraphModule(torch.nn.Module(), graph)


def inputs() -> list[tuple[object, ...]]:
    return [(torch.arange(float(n * n)).reshape(n, n),) for n in (1, 3)]
