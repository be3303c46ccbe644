"""Rotary frequencies that change with the length, updated by transformers' code before a forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True, slots=True)
class ChangingRope:
    """A rotary embedding that depends on the longest position (``dynamic`` or ``longrope``).

    Attributes:
        module: the rotary embedding.
        layer_type: which of its frequencies, where it has several.
        buffer: the name of the frequencies on ``module``.
        captured: the tensor that graphs read; its values change, never its identity.
    """

    module: nn.Module
    layer_type: str | None
    buffer: str
    captured: torch.Tensor

    def update(self, position_ids: torch.Tensor, dtype: torch.dtype) -> None:
        """Let the module choose its frequencies for these positions, as its forward does."""
        longest = position_ids.amax().view(1, 1)
        like = torch.empty(0, dtype=dtype, device=position_ids.device)
        self.module(
            like, longest, **({} if self.layer_type is None else {"layer_type": self.layer_type})
        )
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
        for layer_type, rope_type in _types_of(module).items():
            buffer = "inv_freq" if layer_type is None else f"{layer_type}_inv_freq"
            if ("dynamic" in rope_type or rope_type == "longrope") and hasattr(module, buffer):
                found.append(ChangingRope(module, layer_type, buffer, getattr(module, buffer)))
    return tuple(found)


@contextmanager
def frozen_ropes(decoder: nn.Module) -> Iterator[None]:
    """Keep every rotary embedding from changing its frequencies for the block."""
    before = [(rope.module, rope.module.rope_type) for rope in changing_ropes(decoder)]
    try:
        for module, rope_type in before:
            plain = (
                dict.fromkeys(rope_type, "default") if isinstance(rope_type, dict) else "default"
            )
            module.rope_type = plain
        yield
    finally:
        for module, rope_type in before:
            module.rope_type = rope_type


def _types_of(module: nn.Module) -> dict[str | None, str]:
    """Layer type → rope type; under None where the module has a single one."""
    rope_type = module.__dict__.get("rope_type")
    if isinstance(rope_type, str):
        return {None: rope_type}
    return dict(rope_type) if isinstance(rope_type, dict) else {}
