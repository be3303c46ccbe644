"""A traced graph that says what eager does where torch's own tools would not. In: a graph of Dynamo's. Out: the same graph, changed in place.

What is changed: a dropout that drops nothing, which hands its argument back and which torch's decomposition copies; complex constants that
FX would write as other numbers, as it writes them by their ``repr``.
"""

from __future__ import annotations

import ast
import math

import torch
import torch.fx

_DROPOUTS = (torch.nn.functional.dropout, torch.dropout, torch.ops.aten.dropout.default)
_OF_DROPOUTS = ("input", "p", "train", "inplace")


def as_eager(graph: torch.fx.Graph) -> None:
    """Change what would not be run as it is eagerly."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in _DROPOUTS:
            _hand_back(node)
        elif node.op in ("call_function", "call_method"):
            _spell_out(node)


def _hand_back(dropout: torch.fx.Node) -> None:
    """Put the argument in the place of a dropout that hands it back."""
    given = dict(zip(_OF_DROPOUTS, dropout.args, strict=False)) | dropout.kwargs
    default = dropout.target is torch.nn.functional.dropout
    train = given.get("training", given.get("train", default))
    taken = given.get("input")
    if isinstance(taken, torch.fx.Node) and (train is False or given.get("p", 0.5) == 0):
        dropout.replace_all_uses_with(taken)
        dropout.graph.erase_node(dropout)


def _spell_out(node: torch.fx.Node) -> None:
    """Make complex constants of a call that FX would write as other numbers by a call of ``complex``."""

    def spelt(value: object) -> object:
        if type(value) is not complex or _is_written_well(value):
            return value
        with node.graph.inserting_before(node):
            made = node.graph.call_function(complex, (value.real, value.imag))
        made.meta["example_value"] = value
        return made

    node.args = torch.fx.node.map_aggregate(node.args, spelt)  # type: ignore[assignment, arg-type]
    node.kwargs = torch.fx.node.map_aggregate(node.kwargs, spelt)  # type: ignore[assignment, arg-type]


def _is_written_well(value: complex) -> bool:
    text = repr(value)
    finite = math.isfinite(value.real) and math.isfinite(value.imag)
    return finite and repr(ast.literal_eval(text)) == text
