"""A namedtuple as argument and as output stays a namedtuple."""

from collections import namedtuple

import torch
import torch.fx

Pair = namedtuple("Pair", ["left", "right"])


def join(pair: Pair) -> torch.Tensor:
    return pair.left - pair.right


def build() -> torch.fx.GraphModule:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(torch.neg, (x,))
    joined = graph.call_function(join, (Pair(x, y),))
    graph.output(Pair(Pair(joined, None), [y]))
    return torch.fx.GraphModule(torch.nn.Module(), graph)


def inputs() -> list[tuple[object, ...]]:
    return [(torch.arange(3.0),)]
