"""A forward as one piece. In: a stitching graph and its source. Out: a graph of a single call with the same parameters and results, and its source.

A full graph replays the whole forward, so its replay source is that of a graph with one piece. Nothing is executed.
"""

from __future__ import annotations

import operator

import torch.fx

from piecework.codegen.graph.origin import results_of
from piecework.codegen.graph.structure import new_placeholder
from piecework.codegen.stitch.lower import LowerOptions
from piecework.codegen.stitch.source import StitchedSource, generate_source

WHOLE = "whole_forward"


def whole_forward(
    split_gm: torch.fx.GraphModule, source: StitchedSource
) -> tuple[torch.fx.GraphModule, StitchedSource]:
    """The graph ``return whole_forward(<parameters of source>)``, and its stitching source.

    Weights that ``source`` holds as names of its module are no parameters here either; a full graph has them built in.

    Args:
        split_gm: the stitching graph; it becomes the piece.
        source: its stitching source.
    """
    parameters = [parameter.name for parameter in source.module.entry.parameters]
    graph = torch.fx.Graph()
    inputs = [new_placeholder(graph, name) for name in parameters]
    call = graph.call_module(WHOLE, tuple(inputs))
    outputs = enumerate(results_of(split_gm.graph))
    results = [_element(graph, call, index, each) for index, each in outputs]
    graph.output(tuple(results))
    whole_gm = torch.fx.GraphModule({WHOLE: split_gm}, graph)
    return whole_gm, generate_source(whole_gm, LowerOptions(submods=(WHOLE,), emit_del=False))


def _element(
    graph: torch.fx.Graph, call: torch.fx.Node, index: int, output: object
) -> torch.fx.Node:
    name = output.name if isinstance(output, torch.fx.Node) else None
    return graph.create_node("call_function", operator.getitem, (call, index), name=name)
