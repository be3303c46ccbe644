"""Shapes and slices across a cut: sizes travel as integers, never as a whole shape."""

import operator

import torch
import torch.fx
from piecework.codegen import LowerOptions, split_graph


def build() -> torch.fx.GraphModule:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    x.meta["example_value"] = torch.empty(4, 6, device="meta")
    shape = graph.call_method("size", (x,))
    rows = graph.call_method("size", (x, 0))
    y = graph.call_function(torch.ops.aten.cumsum.default, (x, 0))
    y.meta["example_value"] = torch.empty(4, 6, device="meta")
    part = graph.call_function(operator.getitem, (y, slice(None, rows)))
    less = graph.call_function(operator.sub, (rows, 1))
    shorter = graph.call_function(operator.getitem, (y, slice(None, less)))
    flat = graph.call_method("reshape", (shorter, -1))
    again = graph.call_function(torch.reshape, (y, shape))
    full = graph.call_function(torch.full, (shape, 1.5))
    graph.output((part, flat, again, full))
    gm = torch.fx.GraphModule(torch.nn.Module(), graph)
    return split_graph(gm, ["aten::cumsum"])[0]


def options() -> LowerOptions:
    return LowerOptions()


def inputs() -> list[tuple[object, ...]]:
    return [(torch.arange(24.0).reshape(4, 6),)]
