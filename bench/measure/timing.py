"""Time several ways of doing the same thing in one run.

It never judges a result: correctness is checked by the caller, before anything is timed.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Clock = Callable[[], float]

SLOW = 8  # a contender that needs this many windows for one call takes part in few rounds
SPARSE = 10
WARM = 3  # untimed calls before each window
FEWEST = 20  # rounds, however long they take


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds per call of one contender."""

    # round number → seconds per call; within a round all contenders ran side by side
    rounds: Mapping[int, float]

    @property
    def best(self) -> float:
        """The fastest round: what the code costs when the machine does nothing else."""
        return min(self.rounds.values())


def ratio(timing: Timing, reference: Timing) -> float:
    """How many times as long as ``reference``.

    Whatever else the machine does only ever adds time (it takes the core, or the caches), so the fast rounds tell what
    the code costs; a tenth of them, and not the single fastest, so that one lucky round decides nothing.
    """
    return _undisturbed(timing) / _undisturbed(reference)


def quotients(timing: Timing, reference: Timing) -> list[float]:
    """How many times as long as ``reference``, in each round that both took part in."""
    both = timing.rounds.keys() & reference.rounds.keys()
    return [timing.rounds[each] / reference.rounds[each] for each in sorted(both)]


def _undisturbed(timing: Timing) -> float:
    ordered = sorted(timing.rounds.values())
    return statistics.fmean(ordered[: max(1, len(ordered) // 10)])


def measure(
    contenders: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 400,
    window: float = 0.0004,
    clock: Clock = time.thread_time,
    seconds: float = math.inf,
) -> dict[str, Timing]:
    """Time each contender in turn, ``rounds`` times over or for so many ``seconds``.

    Each window follows a few untimed calls of the same contender: none is timed on the caches of its neighbour.

    Args:
        contenders: name → callable without arguments; each has been called before (warm).
        rounds: how often the whole line-up is repeated; the order alternates.
        window: about how many seconds one contender is called in one round; shorter than a time slice of the system, so
            that most windows are not interrupted.
        clock: seconds; by default the processor time of this thread, which other programs on the machine don't add to.
            Everything compared must run in this one thread then.
        seconds: after these no further round begins, once there are `FEWEST` of them.
    """
    once = {
        name: min(_per_call(call, 1, clock) for _ in range(5)) for name, call in contenders.items()
    }
    counts = {name: max(1, round(window / max(seconds, 1e-8))) for name, seconds in once.items()}
    slow = {name for name, seconds in once.items() if seconds > SLOW * window}
    found: dict[str, dict[int, float]] = {name: {} for name in contenders}
    order = list(contenders)
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        end = time.monotonic() + seconds
        for index in range(rounds):
            if index >= FEWEST and time.monotonic() > end:
                break
            for name in order if index % 2 == 0 else reversed(order):
                if name not in slow or index % SPARSE == 0:
                    for _ in range(min(WARM, counts[name])):
                        contenders[name]()
                    found[name][index] = _per_call(contenders[name], counts[name], clock)
    finally:
        if was_enabled:
            gc.enable()
    return {name: Timing(values) for name, values in found.items()}


def _per_call(call: Callable[[], object], count: int, clock: Clock) -> float:
    repeat = range(count)
    start = clock()
    for _ in repeat:
        call()
    return (clock() - start) / count
