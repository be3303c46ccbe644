"""In-place operators, setitem, out= and a view: what is changed through one name shows through the others."""

import operator

import torch
import torch.fx


def build() -> torch.fx.GraphModule:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    n = graph.placeholder("n")
    base = graph.call_method("clone", (x,))
    view = graph.call_function(operator.getitem, (base, slice(None, n)))
    changed = graph.call_function(operator.iadd, (view, 1))
    graph.call_function(operator.setitem, (base, 0, -5.0))
    graph.call_function(operator.setitem, (base, (slice(1, n), 0), 7.0))
    graph.call_function(torch.mul, (base, 2), {"out": base})
    items = graph.call_function(list, ((1, n),))
    graph.call_function(operator.setitem, (items, 0, n))
    total = graph.call_function(torch.sum, (changed,))
    graph.output((base, changed, total, items, x))
    return torch.fx.GraphModule(torch.nn.Module(), graph)


def inputs() -> list[tuple[object, ...]]:
    return [(torch.arange(8.0).reshape(4, 2), 3)]
