"""Placeholders and nodes named like builtins, imports, keywords and the emitted module's own names."""

import math

import torch
import torch.fx

NAMES = ("torch", "print", "slice", "execution_fn", "__vllm_submods__", "__vllm_consts__", "math")


def build() -> torch.fx.GraphModule:
    graph = torch.fx.Graph()
    given = []
    for name in NAMES:
        node = graph.placeholder(name)
        node._rename(name)
        given.append(node)
    given[0].name = "torch"
    given[1].name = "lambda"
    given[2].name = "slice"
    given[3].name = "execution_fn"
    given[4].name = "__vllm_submods__"
    given[5].name = "__vllm_consts__"
    given[6].name = "not valid!"
    total = graph.call_function(torch.add, (given[0], given[1]))
    total.name = "math"
    root = graph.call_function(math.sqrt, (given[2],))
    root.name = "len"
    size = graph.call_function(len, ([slice(given[3], given[4]), root, given[5], given[6]],))
    graph.output((total, root, size))
    gm = torch.fx.GraphModule(torch.nn.Module(), torch.fx.Graph())
    gm._graph = graph  # FX can interpret such names, but not write them
    return gm


def inputs() -> list[tuple[object, ...]]:
    return [(torch.ones(2), 1, 4, 0, 1, 2, 3)]
