"""The traced forward of a flat decoder: last hidden states of a whole batch's tokens in one row.

Rotary frequencies that change with the length are updated by transformers' code before a forward.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from piecework.integrations.transformers.request.attention import through_piecework
from piecework.integrations.transformers.settings import embedding_of
from piecework.integrations.transformers.way import TracedForward
from piecework.runtime.torch_compat import Mark, unbacked_mark
from piecework.runtime.trace.dynamic_dims import Marks
from piecework.runtime.trace.sizes import SizePolicy

# What stands for the number of tokens when a forward is traced; any number above one does.
_TRACED_ROWS = 6


class FlatIdsForward(TracedForward):
    """The decoder's forward on token ids [1, rows], without cache or mask."""

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        return self.output(input_ids=input_ids, position_ids=position_ids, use_cache=False)[0]


class FlatEmbedsForward(TracedForward):
    """The same on embeddings [1, rows, hidden]."""

    def forward(self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        return self.output(inputs_embeds=inputs_embeds, position_ids=position_ids, use_cache=False)[
            0
        ]


ENTRIES = {"input_ids": FlatIdsForward, "inputs_embeds": FlatEmbedsForward}


@contextmanager
def as_traced(decoder: nn.Module) -> Iterator[None]:
    """Let the decoder's modules behave as the graph has them: attention and rope stay outside."""
    with through_piecework(decoder), frozen_ropes(decoder):
        yield


def example_inputs(decoder: nn.Module, entry: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and positions to trace with; their number stands for any number above one."""
    embedding = embedding_of(decoder)
    positions = torch.arange(_TRACED_ROWS, device=embedding.device).unsqueeze(0)
    if entry == "input_ids":
        return torch.zeros_like(positions), positions
    return embedding.new_zeros(1, _TRACED_ROWS, embedding.shape[1]), positions


class TokenDimension(SizePolicy):
    """Of a flattened forward's arguments the tokens' dimension is dynamic, the second of each."""

    rows_in_one = True

    def every_size(self, args: Sequence[object], kwargs: Mapping[str, object]) -> Marks:
        return [(tensor, unbacked_mark(tensor, 1)) for tensor in args]

    def larger_sizes(self, args: Sequence[object], kwargs: Mapping[str, object]) -> Marks:
        return [(tensor, Mark("dynamic", 1)) for tensor in args if tensor.size(1) > 1]

    def may_differ(self, leaf: int, dim: int) -> bool:
        return dim == 1


@dataclass(frozen=True, slots=True)
class ChangingRope:
    """A rotary embedding that depends on the longest position (``dynamic`` or ``longrope``)."""

    module: nn.Module
    layer_type: str | None  # which of its frequencies, where it has several
    buffer: str  # the name of the frequencies on ``module``
    captured: torch.Tensor  # what graphs read; its values change, never its identity

    def update(self, position_ids: torch.Tensor, dtype: torch.dtype) -> None:
        """Let the module choose its frequencies for these positions, as its forward does."""
        longest = position_ids.amax().view(1, 1)
        like = torch.empty(0, dtype=dtype, device=position_ids.device)
        of_type = {} if self.layer_type is None else {"layer_type": self.layer_type}
        self.module(like, longest, **of_type)
        self.hold()

    def hold(self) -> None:
        """Put the captured tensor back with the present values, where the module replaced it."""
        present = getattr(self.module, self.buffer)
        if present is not self.captured:
            self.captured.copy_(present)
            setattr(self.module, self.buffer, self.captured)


def changing_ropes(decoder: nn.Module) -> tuple[ChangingRope, ...]:
    """The rotary embeddings of ``decoder`` whose frequencies depend on the length."""
    found = []
    for module in decoder.modules():
        rope_type = vars(module).get("rope_type")
        by_layer = rope_type if isinstance(rope_type, dict) else {None: rope_type}
        for layer_type, kind in by_layer.items():
            buffer = "inv_freq" if layer_type is None else f"{layer_type}_inv_freq"
            changes = isinstance(kind, str) and ("dynamic" in kind or kind == "longrope")
            if changes and hasattr(module, buffer):
                found.append(ChangingRope(module, layer_type, buffer, getattr(module, buffer)))
    return tuple(found)


@contextmanager
def frozen_ropes(decoder: nn.Module) -> Iterator[None]:
    """Keep every rotary embedding from changing its frequencies for the block."""
    before = {rope.module: rope.module.rope_type for rope in changing_ropes(decoder)}
    try:
        for module, kind in before.items():
            by_layer = isinstance(kind, dict)
            module.rope_type = dict.fromkeys(kind, "default") if by_layer else "default"
        yield
    finally:
        for module, kind in before.items():
            module.rope_type = kind
