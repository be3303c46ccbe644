"""Recurrent layers. In: a captured graph. Out: the functions of torch that run a whole recurrent layer, as far as the graph calls them.

They stay outside of compiled pieces: a compiler would unroll them over the sequence, which fixes its length and gains nothing over the
kernels that torch has for them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.fx

_LAYERS: tuple[Callable[..., object], ...] = (
    torch.lstm,
    torch.gru,
    torch.rnn_tanh,
    torch.rnn_relu,
)


def recurrent_layers(graph: torch.fx.Graph) -> tuple[Callable[..., object], ...]:
    """The functions among torch's recurrent layers that ``graph`` calls."""
    called = {node.target for node in graph.nodes if node.op == "call_function"}
    return tuple(layer for layer in _LAYERS if layer in called)
