"""A higher-order operator: its branches are graphs that stay whole and travel as constants."""

import operator

import torch
import torch.fx


def _branch(function: object) -> torch.fx.GraphModule:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_function(function, (x,)),))
    return torch.fx.GraphModule(torch.nn.Module(), graph)


def build() -> torch.fx.GraphModule:
    root = torch.nn.Module()
    root.cond_true_0 = _branch(torch.sin)
    root.cond_false_0 = _branch(torch.cos)
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    total = graph.call_method("sum", (x,))
    predicate = graph.call_method("gt", (total, 0))
    true = graph.get_attr("cond_true_0")
    false = graph.get_attr("cond_false_0")
    chosen = graph.call_function(torch.ops.higher_order.cond, (predicate, true, false, (x,)))
    first = graph.call_function(operator.getitem, (chosen, 0))
    graph.output((first,))
    return torch.fx.GraphModule(root, graph)


def inputs() -> list[tuple[object, ...]]:
    return [(torch.arange(4.0),), (-torch.arange(4.0),)]
