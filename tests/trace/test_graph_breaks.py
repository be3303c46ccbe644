"""What Dynamo stops at is told in its words, with the page that says what to write in its place."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from models import EAGER

import piecework
from piecework.bench.lists.tutorials import PackedLSTM
from piecework.errors import CaptureError

X = torch.randn(4, 8)
WORDS = torch.randint(0, 40, (4, 7)), torch.arange(4) + 3


def branch(x: torch.Tensor) -> torch.Tensor:
    return x * 2 if x.sum() > 0 else x - 1


def prints(x: torch.Tensor) -> torch.Tensor:
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
