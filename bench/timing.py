"""Time several ways of doing the same thing in one run. In: named callables. Out: seconds per call of each, over many interleaved rounds.

It never judges a result: correctness is checked by the caller, before anything is timed.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

SLOW = 8  # a contender that needs this many windows for one call takes part in few rounds
SPARSE = 10


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds per call of one contender.

    Attributes:
        rounds: round number → seconds per call; within a round all contenders ran side by side.
    """

    rounds: Mapping[int, float]

    @property
    def best(self) -> float:
        """The fastest round: what the code costs when the machine does nothing else."""
        return min(self.rounds.values())

    @property
    def median(self) -> float:
        return statistics.median(self.rounds.values())


def ratio(timing: Timing, reference: Timing) -> float:
    """How many times as long as ``reference``: the median over rounds of the quotient within a round.

    A round is short, so whatever else the machine does slows both of its sides alike; of two identical contenders this
    comes out within half a percent of 1 on a machine that is busy otherwise, where minima and medians do not.
    """
    shared = timing.rounds.keys() & reference.rounds.keys()
    return statistics.median(timing.rounds[i] / reference.rounds[i] for i in shared)


def measure(
    contenders: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 400,
    window: float = 0.0004,
) -> dict[str, Timing]:
    """Time each contender in turn, ``rounds`` times over, with garbage collection off.

    Args:
        contenders: name → callable without arguments; each has been called before (warm).
        rounds: how often the whole line-up is repeated; the order alternates.
        window: about how many seconds one contender is called in one round; shorter than a time slice of the system, so
            that most windows are not interrupted.
    """
    once = {name: min(_per_call(call, 1) for _ in range(5)) for name, call in contenders.items()}
    counts = {name: max(1, round(window / max(seconds, 1e-8))) for name, seconds in once.items()}
    slow = {name for name, seconds in once.items() if seconds > SLOW * window}
    found: dict[str, dict[int, float]] = {name: {} for name in contenders}
    order = list(contenders)
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for index in range(rounds):
            for name in order if index % 2 == 0 else reversed(order):
                if name not in slow or index % SPARSE == 0:
                    found[name][index] = _per_call(contenders[name], counts[name])
    finally:
        if was_enabled:
            gc.enable()
    return {name: Timing(values) for name, values in found.items()}


def _per_call(call: Callable[[], object], count: int) -> float:
    repeat = range(count)
    start = time.perf_counter()
    for _ in repeat:
        call()
    return (time.perf_counter() - start) / count
