"""Weights that show a wrong result. In: a model just made, or how it is made. Out: the same with seeded noise on every weight, zeros and ones among them.

A model is often made with blocks that add nothing (zero scales, zero gates); two runs of such blocks always agree.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from piecework.errors import UsageError
from piecework.integrations.protocol import first_line


@torch.no_grad()
def add_noise(model: torch.nn.Module, seed: int) -> None:
    """Add normal noise of 0.02 to each floating point parameter, in place."""
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        if weight.is_floating_point():
            noise = torch.randn(weight.shape, generator=generator)
            weight.add_(noise.to(weight.dtype) * 0.02)


def with_seeded_weights(
    make: Callable[[], torch.nn.Module], name: str, file: Path, seed: int
) -> torch.nn.Module:
    """What ``make`` makes, with noise on its weights.

    Args:
        name, file: what is made, and of which config, for errors.

    Raises:
        UsageError: it can't be made.
    """
    torch.manual_seed(seed)
    try:
        model = make()
    except Exception as error:  # a config that doesn't fit its model fails in its layers
        raise UsageError(
            f"no {name} can be made of {str(file)!r}: {type(error).__name__}: {first_line(error)}",
            hint="its fields do not fit together, or the class makes no model of a config alone: use module:factory",
        ) from error
    add_noise(model, seed)
    return model
