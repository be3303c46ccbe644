"""The traced forward: in, the tokens of a whole batch in one row and their positions; out, their last hidden states.

It never sees a KV cache, a mask or the batch's shape; those belong to the request behind the splitting op.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from piecework.errors import CaptureError, PieceworkError
from piecework.integrations.transformers.attention import through_piecework
from piecework.runtime.torch_compat import mark_unbacked
from torch import nn

# What stands for the number of tokens when a forward is traced; any number above one does.
_TRACED_ROWS = 6


class FlatForward(nn.Module):
    """The decoder's own forward, called on one row of tokens without cache or mask.

    Args:
        decoder: the module whose weights and layers are traced.
        forward: its original forward, bound.
        entry: "input_ids" or "inputs_embeds", what the tokens come as.
    """

    def __init__(self, decoder: nn.Module, forward: Callable[..., object], entry: str) -> None:
        super().__init__()
        self.model = decoder
        self._forward = forward
        self._entry = entry

    def forward(self, tokens: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """Hidden states [1, rows, hidden] of ``tokens`` [1, rows] (or [1, rows, hidden]) at ``position_ids`` [1, rows]."""
        given = {self._entry: tokens}
        return self._forward(**given, position_ids=position_ids, use_cache=False, return_dict=True)[
            0
        ]


def example_inputs(decoder: nn.Module, entry: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs to trace with; their number of tokens is the one dynamic dimension, and stands for any number."""
    embedding = decoder.get_input_embeddings().weight
    position_ids = torch.arange(_TRACED_ROWS, device=embedding.device).unsqueeze(0)
    if entry == "input_ids":
        tokens = torch.zeros_like(position_ids)
    else:
        width = embedding.shape[1]
        tokens = torch.zeros(1, _TRACED_ROWS, width, dtype=embedding.dtype, device=embedding.device)
    for tensor in (tokens, position_ids):
        mark_unbacked(tensor, 1, shape_id="tokens")
    return tokens, position_ids


def compile_forward(flat: FlatForward, entry: str, config: object) -> Callable[..., torch.Tensor]:
    """Capture ``flat`` whole and stitch it.

    Raises:
        CaptureError: the model's forward can't be captured as one graph; the message has Dynamo's reason.
    """
    inputs = example_inputs(flat.model, entry)
    try:
        with torch.no_grad(), through_piecework(flat.model):
            return _compile(flat, inputs, config)
    except PieceworkError:
        raise
    except (torch._dynamo.exc.TorchDynamoException, RuntimeError, ValueError) as error:
        raise CaptureError(
            f"the model's forward could not be captured as one graph: {_first_line(error)}",
            where=type(flat.model).__name__,
            hint="leave this model unstitched; TORCH_LOGS=graph_breaks says where it breaks",
        ) from error


def _compile(
    flat: FlatForward, inputs: tuple[torch.Tensor, ...], config: object
) -> Callable[..., torch.Tensor]:
    captured: list[torch.fx.GraphModule] = []

    def keep(gm: torch.fx.GraphModule, _example: object) -> Callable[..., object]:
        captured.append(gm)
        return gm

    compiled = torch.compile(flat, fullgraph=True, backend=keep)

    def run(*args: torch.Tensor) -> torch.Tensor:
        for a in args:
            mark_unbacked(a, 1, shape_id="tokens")
        with through_piecework(flat.model):
            out = compiled(*args)
        assert len(captured) == 1, len(captured)
        return out

    run.captured = captured
    return run


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
