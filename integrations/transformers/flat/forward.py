"""The traced forward: last hidden states of the tokens of a whole batch in one row.

Cache, mask and the batch's shape belong to the request behind the splitting op.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from piecework.integrations.transformers.flat.rope import frozen_ropes
from piecework.integrations.transformers.request.attention import attention, through_piecework
from piecework.runtime.compile import compile_with_mode
from piecework.runtime.config.compilation import CompilationConfig
from piecework.runtime.stitched import StitchedModule
from piecework.runtime.torch_compat import Mark, unbacked_mark
from piecework.runtime.trace.dynamic_dims import Marks
from piecework.runtime.trace.sizes import SizePolicy

# What stands for the number of tokens when a forward is traced; any number above one does.
_TRACED_ROWS = 6


class FlatForward(nn.Module):
    """The decoder's own forward on one row of tokens, without cache or mask.

    Args:
        decoder: the module whose weights and layers are traced.
        forward: its original forward, bound.
    """

    def __init__(self, decoder: nn.Module, forward: Callable[..., object]) -> None:
        super().__init__()
        self.model = decoder
        # Unbound where it is the decoder's own, so that weights are named by way of ``self.model``.
        own = inspect.ismethod(forward) and forward.__self__ is decoder
        self._function = forward.__func__ if own else None
        self._bound = None if own else forward

    def hidden_states(self, **given: torch.Tensor) -> torch.Tensor:
        """The last hidden states [1, rows, hidden]."""
        if self._function is not None:
            output = self._function(self.model, **given, use_cache=False, return_dict=True)
        else:
            output = self._bound(**given, use_cache=False, return_dict=True)
        return output[0]


class FlatIdsForward(FlatForward):
    """``FlatForward`` of token ids [1, rows]."""

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        return self.hidden_states(input_ids=input_ids, position_ids=position_ids)


class FlatEmbedsForward(FlatForward):
    """``FlatForward`` of embeddings [1, rows, hidden]."""

    def forward(self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        return self.hidden_states(inputs_embeds=inputs_embeds, position_ids=position_ids)


ENTRIES = {"input_ids": FlatIdsForward, "inputs_embeds": FlatEmbedsForward}


@contextmanager
def as_traced(decoder: nn.Module) -> Iterator[None]:
    """Let the decoder's modules behave as the graph has them: attention and rope stay outside."""
    with through_piecework(decoder), frozen_ropes(decoder):
        yield


def example_inputs(decoder: nn.Module, entry: str) -> dict[str, torch.Tensor]:
    """Inputs to trace with; their number of tokens stands for any number above one."""
    embedding = decoder.get_input_embeddings().weight
    position_ids = torch.arange(_TRACED_ROWS, device=embedding.device).unsqueeze(0)
    if entry == "input_ids":
        tokens = torch.zeros_like(position_ids)
    else:
        shape = (1, _TRACED_ROWS, embedding.shape[1])
        tokens = torch.zeros(shape, dtype=embedding.dtype, device=embedding.device)
    return {entry: tokens, "position_ids": position_ids}


class TokenDimension(SizePolicy):
    """Of a flattened forward's arguments the tokens' dimension is dynamic, the second of each."""

    rows_in_one = True

    def every_size(self, args: Sequence[object], kwargs: Mapping[str, object]) -> Marks:
        return [(tensor, unbacked_mark(tensor, 1)) for tensor in args]

    def larger_sizes(self, args: Sequence[object], kwargs: Mapping[str, object]) -> Marks:
        return [(tensor, Mark("dynamic", 1)) for tensor in args if tensor.size(1) > 1]

    def may_differ(self, leaf: int, dim: int) -> bool:
        return dim == 1


def flattened(
    decoder: nn.Module,
    forward: Callable[..., object],
    entry: str,
    config: CompilationConfig | None,
    kept: Mapping[str, object],
) -> StitchedModule:
    """The decoder's flattened forward, to be captured and stitched, or taken from an artifact.

    Args:
        entry: what the tokens come as, "input_ids" or "inputs_embeds".
        kept: what another process needs to know to serve it.
    """
    # The class's name labels the model in the emitted banner and in the report.
    named = type(type(decoder).__name__, (ENTRIES[entry],), {})
    return compile_with_mode(
        named(decoder, forward),
        splitting_ops=_splitting_ops(config),
        config=config,
        sizes=TokenDimension(),
        around=partial(as_traced, decoder),
        kept=kept,
        deferred=True,
    )


def compile_forward(made: StitchedModule, decoder: nn.Module, entry: str) -> None:
    """Compile what `flattened` made; raises `CaptureError` where it is no one graph."""
    with torch.no_grad():
        made.prepare(*example_inputs(decoder, entry).values())


def _splitting_ops(config: CompilationConfig | None) -> list[object] | None:
    """The user's own ops with attention; None is every registered op."""
    if config is None or config.splitting_ops is None:
        return None
    return [*config.splitting_ops, attention]
