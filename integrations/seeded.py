"""Weights that show a wrong result. In: a model just made. Out: the same with seeded noise on every weight, zeros and ones among them.

A model is often made with blocks that add nothing (zero scales, zero gates); two runs of such blocks always agree.
"""

from __future__ import annotations

import torch


@torch.no_grad()
def add_noise(model: torch.nn.Module, seed: int) -> None:
    """Add normal noise of 0.02 to each floating point parameter, in place."""
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        if weight.is_floating_point():
            noise = torch.randn(weight.shape, generator=generator)
            weight.add_(noise.to(weight.dtype) * 0.02)
