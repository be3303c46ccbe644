"""What docs/graph-breaks.md says to write in place of what Dynamo stops at is served."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import piecework
from piecework.bench.lists.tutorials import MaskedLSTM

EAGER = piecework.CompilationConfig(backend="eager")
X = torch.randn(4, 8)
WORDS = torch.randint(0, 40, (4, 7)), torch.arange(4) + 3


class Causal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(len(x))
        return self.encoder(x, mask, is_causal=True)


def chosen(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x.sum() > 0, x * 2, x - 1)


def prints_eagerly(x: torch.Tensor) -> torch.Tensor:
    if not torch.compiler.is_compiling():
        print("here")
    return x + 1


@pytest.mark.parametrize(
    ("after", "args"),
    [
        (chosen, (X,)),
        (prints_eagerly, (X,)),
        (MaskedLSTM().eval(), WORDS),
        (Causal().eval(), (torch.randn(5, 2, 8),)),
    ],
    ids=["where", "print", "packed", "mask"],
)
def test_the_cure_is_served(after: Callable[..., torch.Tensor], args: object) -> None:
    stitched = piecework.compile(after, args, config=EAGER)
    torch.testing.assert_close(stitched(*args), after(*args), check_stride=False)
