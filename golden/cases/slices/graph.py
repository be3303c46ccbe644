"""Nodes inside slices, in every nesting: alone, in tuples, in lists, in dicts, as an argument."""

import operator

import torch
import torch.fx


def keep(value: object) -> object:
    return value


def build() -> torch.fx.GraphModule:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    n = graph.placeholder("n")
    results = [
        graph.call_function(operator.getitem, (x, index))
        for index in (
            slice(None, n),
            slice(n, None, None),
            slice(None, None, n),
            slice(-1, None),
            (slice(1, n), 0),
            (..., None, slice(n, None, 2)),
            (slice(None), [0, n]),
            (n,),
            (),
        )
    ]
    results.append(graph.call_function(keep, ({"a": [slice(n, (n, 1), None)], "b": (slice(n),)},)))
    graph.output(tuple(results))
    return torch.fx.GraphModule(torch.nn.Module(), graph)


def inputs() -> list[tuple[object, ...]]:
    return [(torch.arange(12.0).reshape(4, 3), n) for n in (1, 2)]
