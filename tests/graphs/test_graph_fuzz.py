"""Random stitched programs, captured and replayed in random order, equal themselves run plainly."""

from __future__ import annotations

import torch
from hand_captured import HandCaptured
from hypothesis import given, settings
from hypothesis import strategies as st

from piecework.runtime.batch.mode import CUDAGraphMode

HIDDEN = 4


# Pieces take and return rows independently, so padding rows can never matter.
PIECES = {
    "mix": lambda x, y, w: (torch.tanh(x @ w + y), x + y),
    "swap": lambda x, y, w: (y, x * 2),
    "view": lambda x, y, w: ((x + 1).view(-1, 2, HIDDEN // 2).transpose(1, 2).reshape(x.shape), y),
    "parts": lambda x, y, w: tuple(torch.cat([x, y], -1).split(HIDDEN, dim=-1)),
    "strided": lambda x, y, w: (torch.stack([x, y], -1)[..., 1], x),
    "same": lambda x, y, w: ((z := x * w[0]), z),
    "in place": lambda x, y, w: (x.add_(1), y),
}
SPLITS = {
    "fresh": lambda x, y, out: (x.flip(-1), y.clone()),
    "in place": lambda x, y, out: (x.mul_(0.5), y),
    "out-buffer": lambda x, y, out: (out[: len(x)].copy_(x).neg_(), y),
    "strided": lambda x, y, out: (torch.stack([x, y])[0], torch.stack([x, y], -1)[..., 1]),
    "views of one": lambda x, y, out: tuple(torch.stack([x, y]).unbind()),
    "nothing": lambda x, y, out: (x, y),
}
PROGRAMS = st.lists(
    st.tuples(st.sampled_from(sorted(PIECES)), st.sampled_from(sorted(SPLITS))),
    min_size=1,
    max_size=4,
)


class Program(HandCaptured):
    """A list of (piece, splitting op) steps over two values."""

    values = ("x", "y")

    def __init__(self, steps, *told, **options):
        self.steps = steps
        super().__init__(*told, **options, layers=len(steps), hidden=HIDDEN)

    def piece(self, number):
        return PIECES[self.steps[number][0]]

    def mutated(self, number):
        return frozenset({0} if self.steps[number][0] == "in place" else ())

    def split(self, number, values, out):
        return SPLITS[self.steps[number][1]](*values, out)


@settings(deadline=None, max_examples=12)
@given(
    PROGRAMS,
    st.sampled_from(["PIECEWISE", "FULL", "FULL_AND_PIECEWISE"]),
    st.sampled_from(["copy", "eager"]),
    st.sets(st.integers(1, 6), min_size=1, max_size=3),
    st.lists(st.tuples(st.integers(1, 6), st.booleans()), min_size=1, max_size=8),
)
def test_captured_equals_plain(steps, mode, policy, sizes, batches):
    program = Program(steps, CUDAGraphMode.parse(mode), tuple(sizes), policy=policy)
    program.capture()
    for n, uniform in batches:
        if n <= program.largest:
            assert program.check(n, uniform) is not CUDAGraphMode.NONE
