"""Results with several elements are unpacked in one statement; where an element is picked late they are not."""

import operator

import torch
import torch.fx
from torch.fx.passes.fake_tensor_prop import FakeTensorProp


def build() -> torch.fx.GraphModule:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    halves = graph.call_function(torch.chunk, (x, 2))
    left = graph.call_function(operator.getitem, (halves, 0))
    right = graph.call_function(operator.getitem, (halves, 1))
    thirds = graph.call_function(torch.split, (x, 2))
    middle = graph.call_function(operator.getitem, (thirds, 1))
    pair = graph.call_function(torch.ops.aten.aminmax.default, (x,), {"dim": 0})
    low = graph.call_function(operator.getitem, (pair, 0))
    rows = graph.call_method("unbind", (x,))
    last = graph.call_function(operator.getitem, (rows, -1))
    count = graph.call_function(len, (rows,))
    again = graph.call_function(operator.getitem, (halves, 0))
    graph.output((left, right, middle, low, last, count, again))
    gm = torch.fx.GraphModule(torch.nn.Module(), graph)
    FakeTensorProp(gm).propagate(torch.empty(6, 2))
    return gm


def inputs() -> list[tuple[object, ...]]:
    return [(torch.arange(12.0).reshape(6, 2),)]
