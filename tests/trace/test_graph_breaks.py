"""What Dynamo stops at is told in its words, with the page that says what to write in its place; and that is served."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import nn

import piecework
from piecework.bench.lists.tutorials import MaskedLSTM, PackedLSTM
from piecework.errors import CaptureError

EAGER = piecework.CompilationConfig(backend="eager")
X = torch.randn(4, 8)
WORDS = torch.randint(0, 40, (4, 7)), torch.arange(4) + 3


class Causal(nn.Module):
    def __init__(self, hint: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16)
        self.encoder, self.hint = nn.TransformerEncoder(layer, 1), hint

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(len(x))
        return self.encoder(x, mask, is_causal=True) if self.hint else self.encoder(x, mask)


def branch(x: torch.Tensor) -> torch.Tensor:
    return x * 2 if x.sum() > 0 else x - 1


def chosen(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x.sum() > 0, x * 2, x - 1)


def prints(x: torch.Tensor) -> torch.Tensor:
    print("here")
    return x + 1


def prints_eagerly(x: torch.Tensor) -> torch.Tensor:
    if not torch.compiler.is_compiling():
        print("here")
    return x + 1


@torch.compiler.disable
def disabled(x: torch.Tensor) -> torch.Tensor:
    return x + 1


@pytest.mark.parametrize(
    ("before", "args", "says"),
    [
        (branch, (X,), "torch.where"),
        (prints, (X,), "`print`"),
        (lambda x: x * random.random(), (X,), "splitting_op"),
        (lambda x: disabled(x) * 2, (X,), "Remove the `torch.compiler.disable` call"),
        (PackedLSTM().eval(), WORDS, "Avoid calling the function `pack_padded_sequence`"),
    ],
    ids=["branch", "print", "random", "disable", "packed"],
)
def test_dynamos_words_and_where_cures_are_told(
    before: Callable[..., object], args: object, says: str
) -> None:
    with pytest.raises(CaptureError, match="can't be captured as one graph") as refused:
        piecework.compile(before, args, config=EAGER)
    assert says in str(refused.value) and "docs/graph-breaks.md" in (refused.value.hint or "")


@pytest.mark.parametrize(
    ("after", "args"),
    [
        (chosen, (X,)),
        (prints_eagerly, (X,)),
        (MaskedLSTM().eval(), WORDS),
        (Causal(hint=True).eval(), (torch.randn(5, 2, 8),)),
    ],
    ids=["where", "print", "packed", "mask"],
)
def test_the_cure_is_served(after: Callable[..., torch.Tensor], args: object) -> None:
    stitched = piecework.compile(after, args, config=EAGER)
    torch.testing.assert_close(stitched(*args), after(*args), check_stride=False)
