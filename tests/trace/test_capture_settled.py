"""A forward that sets plain attributes, which its next call finds set. In: modules that do so at their first call. Out: eager's results and eager's attributes; what goes on changing is refused, and put back."""

from __future__ import annotations

import contextlib

import pytest
import torch
from models import EAGER
from torch import nn

import piecework
from piecework.errors import CaptureError, PieceworkError

X = torch.randn(4, 8)


class Window(nn.Module):
    """As windowed attention does: a window that is larger than what it looks at is made smaller, once."""

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window, self.shift, self.proj = window, window // 2, nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.window >= 8:
            self.window, self.shift = 8, 0
        return self.proj(torch.roll(x, self.shift, 1)).unfold(1, self.window, 1).sum(2)


class Stage(nn.Module):
    def __init__(self, *, fails: bool = False) -> None:
        super().__init__()
        self.parts, self.fails = nn.ModuleList([Window(4), Window(9), Window(8)]), fails

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([part(x) for part in self.parts], 1)
        if self.fails:
            print(x.sum().item() > 3)
        return x

    def settings(self) -> list[object]:
        return [(part.window, part.shift) for part in self.parts]


def test_the_first_call_s_attributes_are_set_and_results_are_eagers() -> None:
    torch.manual_seed(0)
    model = Stage().eval()
    torch.manual_seed(0)
    eager = Stage().eval()
    wants = [eager(X[:rows]) for rows in (4, 1, 2)]
    stitched = piecework.compile(model, (X,), config=EAGER)
    assert model.settings() == eager.settings() == [(4, 2), (8, 0), (8, 0)]
    for rows, want in zip((4, 1, 2), wants, strict=True):
        assert torch.equal(stitched(X[:rows]), want)
    model.parts[0].shift = 1  # watched like any other attribute that the trace read
    with contextlib.suppress(PieceworkError):
        assert torch.equal(stitched(X), model(X))


def test_where_compilation_fails_afterwards_they_are_put_back() -> None:
    model = Stage(fails=True).eval()
    with pytest.raises(PieceworkError):
        piecework.compile(model, (X,), config=EAGER)
    assert model.settings() == [(4, 2), (9, 4), (8, 4)]


class Writes(nn.Module):
    """What ``write`` does in each call is no first call's affair."""

    def __init__(self, write: str) -> None:
        super().__init__()
        self.proj, self.write = nn.Linear(8, 8), write
        self.calls, self.flag, self.last, self.seen = 0, False, 0, [0]

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value if name != "size" else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.write == "counts":
            self.calls += 1
        elif self.write == "toggles":
            self.flag = not self.flag
        elif self.write == "keeps the batch":
            self.last = x.shape[0]
        elif self.write == "sets and appends":
            self.flag = True
            self.seen.append(1)
        elif self.write == "adds, by a setter of its own":
            self.size = 3
        elif self.write == "sets a tensor":
            self.last = x.sum()
        return self.proj(x) * (2 if self.flag else 1) + self.calls


@pytest.mark.parametrize(
    "write",
    [
        *("counts", "toggles", "keeps the batch", "sets and appends"),
        *("adds, by a setter of its own", "sets a tensor"),
    ],
)
def test_what_is_set_anew_in_each_call_is_refused_and_put_back(write: str) -> None:
    model = Writes(write).eval()
    before = {key: value for key, value in vars(model).items() if not key.startswith("_")}
    with pytest.raises(CaptureError, match="own state"):
        piecework.compile(model, (X,), config=EAGER)
    assert {key: value for key, value in vars(model).items() if not key.startswith("_")} == before
    assert model.seen == [0]
