"""Keyword arguments whose names are Python keywords or no identifiers; their order is kept."""

import torch
import torch.fx


def received(*args: object, **kwargs: object) -> list[tuple[str, object]]:
    return [*kwargs.items()]


def build() -> torch.fx.GraphModule:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    plain = graph.call_function(received, (), {"a": 1, "b": x})
    mixed = graph.call_function(
        received, (x,), {"a": 1, "from": x, "b": 2, "a-b": [x], "": 3, "\u00e9": 4, "print": 5}
    )
    debug = graph.call_function(received, (), {"__debug__": 1, "None": 2, "self": 3})
    uniform = graph.call_method("uniform_", (x,), {"from": 0.0, "to": 0.0})
    graph.output((plain, mixed, debug, uniform))
    gm = torch.fx.GraphModule(torch.nn.Module(), torch.fx.Graph())
    gm._graph = graph  # FX can interpret such keywords, but not write them
    return gm


def inputs() -> list[tuple[object, ...]]:
    return [(torch.ones(2),)]
