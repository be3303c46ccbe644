"""Outputs nested in dicts, lists, tuples and slices, with literals and constants between them."""

import torch
import torch.fx


def build() -> torch.fx.GraphModule:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(torch.exp, (x,))
    z = graph.call_function(torch.log, (y,))
    graph.output(
        {"hidden": [y, (z, None), []], "logits": y, 3: {"dtype": torch.int8, "at": slice(1, None)}}
    )
    return torch.fx.GraphModule(torch.nn.Module(), graph)


def inputs() -> list[tuple[object, ...]]:
    return [(torch.arange(3.0),)]
