"""The head of a causal LM in static graphs of its own; without graphs it stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeGuard

import torch
from torch import nn

from piecework.runtime import torch_compat
from piecework.runtime.compile import compile as compile_model
from piecework.runtime.config.compilation import CompilationConfig
from piecework.runtime.stitched import StitchedModule


class FlatHead(nn.Module):
    """A head on one row of hidden states, [tokens, hidden]."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head
        self._function = type(head).forward

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._function(self.head, hidden)


class HeadForward:
    """Stands in for a head's ``forward``: any batch, by the stitched head of one row of states.

    Args:
        head: the module; see `can_be_captured`.
        config: for ``piecework.compile``.
    """

    def __init__(self, head: nn.Linear, config: CompilationConfig | None) -> None:
        self._original: Callable[[torch.Tensor], torch.Tensor] = head.forward
        weight = head.weight
        example = torch.zeros(2, head.in_features, dtype=weight.dtype, device=weight.device)
        self.stitched: StitchedModule = compile_model(FlatHead(head), (example,), config=config)

    @torch.compiler.disable
    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() or torch_compat.compiler_off() is not None:
            return self._original(hidden)
        rows = hidden.reshape(-1, hidden.shape[-1]).contiguous()
        logits = self.stitched(rows)
        return logits.view(*hidden.shape[:-1], logits.shape[-1])


def can_be_captured(head: object) -> TypeGuard[nn.Linear]:
    """Whether a head is a plain product with its class's own forward and nothing around it."""
    if not isinstance(head, nn.Linear) or "forward" in vars(head):
        return False
    return not head._forward_hooks and not head._forward_pre_hooks
