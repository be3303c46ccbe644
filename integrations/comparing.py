"""Comparing two runs of one model. In: their outcomes. Out: whether the tokens are the same, and how far the values differ."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from piecework.integrations.protocol import Outcome

#: Largest accepted difference, relative to the largest value (float32, another order of summation).
TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class Comparison:
    """Whether two runs agree: the same tokens, and values within `TOLERANCE`, relative to the largest value."""

    tokens_equal: bool
    difference: float

    @property
    def agree(self) -> bool:
        return self.tokens_equal and self.difference <= TOLERANCE

    def text(self, outcome: Outcome) -> str:
        """What was compared of ``outcome``, and how it came out."""
        shapes = [f"{str(v.dtype).removeprefix('torch.')}{list(v.shape)}" for v in outcome.values]
        shown = ", ".join(shapes[:3]) + (f" and {len(shapes) - 3} more" if len(shapes) > 3 else "")
        what = f"results ({shown})" if outcome.tokens is None else "logits"
        tokens = (
            ""
            if outcome.tokens is None
            else f"tokens {'equal' if self.tokens_equal else 'DIFFER'}; "
        )
        verdict = "they agree" if self.agree else "they DISAGREE"
        return f"{tokens}{what} differ by {self.difference:.1e} relative (limit {TOLERANCE:.0e}): {verdict}"


def compare(reference: Outcome, other: Outcome) -> Comparison:
    """Compare two runs of the same model on the same arguments."""
    tokens_equal = (reference.tokens is None) == (other.tokens is None) and (
        reference.tokens is None or torch.equal(reference.tokens, other.tokens)
    )
    worst = 0.0
    for expected, actual in zip(reference.values, other.values, strict=True):
        if expected.shape != actual.shape or expected.dtype != actual.dtype:
            return Comparison(tokens_equal, float("inf"))
        if expected.numel() == 0:
            continue
        largest = expected.double().abs().max().item() or 1.0
        difference = (expected.double() - actual.double()).abs().max().item() / largest
        worst = max(worst, difference if difference == difference else float("inf"))
    return Comparison(tokens_equal, worst)
