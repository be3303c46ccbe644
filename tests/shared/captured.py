"""Models that are compiled and captured at once, and what their calls ran as."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from models import EAGER

import piecework


def captured(
    model: Callable[..., object],
    *args: object,
    sizes: Sequence[int] = (2, 4),
    unbacked: bool = False,
    config: piecework.CompilationConfig = EAGER,
    **options: object,
) -> piecework.StitchedModule:
    """``model`` for ``args``, what lies beyond a batch poisoned.

    Args:
        unbacked: no number is known of the batch: that of every tensor with as many rows as the first.
    """
    for each in args if unbacked else ():
        if isinstance(each, torch.Tensor) and each.shape[:1] == args[0].shape[:1]:
            torch._dynamo.decorators.mark_unbacked(each, 0)
    stitched = piecework.compile(model, args, config=config)
    told = {"progress": False, "estimate": False, "poison": True, **options}
    return stitched.capture(sizes, **told)


def calls(stitched: piecework.StitchedModule, by: str = "reason") -> dict[str, int]:
    """How many calls ran for each reason, or in each ``mode``."""
    found: Counter[str] = Counter()
    for row in stitched.call_report():
        found[getattr(row, by)] += row.calls
    return dict(found)


def sizes_of(stitched: piecework.StitchedModule) -> list[int]:
    """The captured sizes that are served from replay source."""
    return sorted(descriptor.num_tokens for _, descriptor in stitched.static_graphs.replays)


def assert_same(
    stitched: piecework.StitchedModule, model: Callable[..., object], *args: object
) -> None:
    """Both return the same, and leave the same in the arguments."""
    mine, theirs = (
        [each.clone() if isinstance(each, torch.Tensor) else each for each in args]
        for _ in range(2)
    )
    with torch.no_grad():
        torch.testing.assert_close(stitched(*mine), model(*theirs))
    torch.testing.assert_close(mine, theirs)
