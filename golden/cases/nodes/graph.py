"""One statement of each kind: operators, methods, builtins, slices, keywords, literals and text that could end a literal."""

import math
import operator

import torch
import torch.fx


def build() -> torch.fx.GraphModule:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    scale = graph.placeholder("scale", default_value=2.0)
    y = graph.call_function(operator.matmul, (x, x))
    y = graph.call_function(operator.add, (y, -1))
    y = graph.call_function(operator.iadd, (y, scale))
    y = graph.call_function(operator.neg, (y,))
    rows = graph.call_function(getattr, (y, "shape"))
    rows = graph.call_function(operator.getitem, (rows, 0))
    root = graph.call_function(math.sqrt, (rows,))
    part = graph.call_function(slice, (0, rows, 2))
    y = graph.call_function(operator.getitem, (y, (part, None, ...)))
    y = graph.call_method("transpose", (y, -1, -2))
    y = graph.call_method("to", (y,), {"dtype": torch.float64, "copy": True})
    y = graph.call_function(torch.ops.aten.sum.dim_IntList, (y, [-1]), {"keepdim": False})
    text = graph.call_function(len, ('"""\\\n\N{SNOWMAN}{}',))
    values = (float("nan"), float("inf"), -0.0, 1j, torch.Size([2]), True, b"\x00")
    graph.output({"result": (y, root), "text": text, "values": values})
    return torch.fx.GraphModule(torch.nn.Module(), graph)


def inputs() -> list[tuple[object, ...]]:
    torch.manual_seed(0)
    return [(torch.randn(4, 4),), (torch.randn(2, 2), 3.0)]
