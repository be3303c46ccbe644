"""Running a model twice and comparing. In: a `LoadedModel`, with and without its stitched form. Out: results, and how far they differ.

A causal LM generates greedily with its own ``generate()``; any other model is called once. The model is not changed.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch.utils import _pytree as pytree

from piecework.integrations.loading import LoadedModel
from piecework.runtime.stitched import StitchedModule

#: Largest accepted difference, relative to the largest value (float32, another order of summation).
TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run.

    Attributes:
        tokens: generated token ids ``[new]``; None for a model that is no causal LM.
        values: what is compared: the logits ``[new, vocabulary]`` that chose the tokens, or the model's tensors.
        seconds: wall time.
    """

    tokens: torch.Tensor | None
    values: tuple[torch.Tensor, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """Whether two runs agree: the same tokens, and values within `TOLERANCE`, relative to the largest value."""

    tokens_equal: bool
    difference: float

    @property
    def agree(self) -> bool:
        return self.tokens_equal and self.difference <= TOLERANCE


@torch.no_grad()
def run_model(
    loaded: LoadedModel, new_tokens: int, stitched: StitchedModule | None = None
) -> Outcome:
    """Run ``loaded`` on its example arguments: generate ``new_tokens`` tokens, or call it once.

    Args:
        stitched: the stitched form to call in place of a model that is no causal LM (those are stitched in place).
    """
    start = time.perf_counter()
    if not loaded.causal_lm:
        result = (stitched or loaded.module)(*loaded.example_args)
        values = tuple(x for x in pytree.tree_leaves(result) if isinstance(x, torch.Tensor))
        return Outcome(None, values, time.perf_counter() - start)
    (prompt,) = loaded.example_args
    out = loaded.module.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    seconds = time.perf_counter() - start
    logits = torch.stack([step[0] for step in out.logits])
    return Outcome(out.sequences[0, prompt.shape[1] :], (logits,), seconds)


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
