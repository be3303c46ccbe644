"""Whether graphs are worth it: the time of each way to serve a batch size, in one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from piecework.collector import collector_paused
from piecework.runtime.batch.coverage import aligned

#: A way is not used that took so much more time than another, as a part of that.
SLACK = 0.02
EAGER, STITCHED, CAPTURED = "eager", "stitched", "captured"


@dataclass(frozen=True, slots=True)
class MeasuredSize:
    """Seconds of a call of one batch size by each way, in the fastest tenth of its rounds."""

    size: int
    seconds: Mapping[str, float]

    @property
    def best(self) -> str:
        """Captured, else stitched, unless another way was faster by more than `SLACK`."""
        fastest = min(self.seconds.values())
        ways = (each for each in (CAPTURED, STITCHED, EAGER) if each in self.seconds)
        return next(each for each in ways if self.seconds[each] <= fastest * (1 + SLACK))


@dataclass(frozen=True, slots=True)
class Measurement:
    """What `StitchedModule.measure` found; ``str`` of it is a table.

    ``device`` is where it ran; on a CPU, what is captured is a stand-in for testing.
    """

    rows: tuple[MeasuredSize, ...]
    device: str

    @property
    def worth_capturing(self) -> tuple[int, ...]:
        """The sizes of which no graph was slower than another way."""
        slower = {row.size for row in self.rows if row.best != CAPTURED}
        return tuple(sorted({row.size for row in self.rows} - slower))

    def __str__(self) -> str:
        ways = (EAGER, STITCHED, CAPTURED)
        cells = [("size", *(f"{each}, µs" for each in ways), "use")]
        for row in self.rows:
            times = [f"{row.seconds[w] * 1e6:.0f}" if w in row.seconds else "-" for w in ways]
            cells.append((str(row.size), *times, row.best))
        on_cpu = self.device == "cpu"
        return aligned(cells) + "\nstatic graphs on a CPU are a stand-in for testing" * on_cpu


def measured(
    size: int,
    ways: Mapping[str, Callable[[], object]],
    synchronize: Callable[[], None],
    *,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> MeasuredSize:
    """Time each way in turn until ``seconds`` are over, after one call of each."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for call in ways.values():
        call()
    with collector_paused():
        end, order = clock() + seconds, list(ways)
        while clock() < end or len(found[order[0]]) < 3:
            for name in order:
                synchronize()
                start = clock()
                ways[name]()
                synchronize()
                found[name].append(clock() - start)
            order.reverse()
    # Whatever else the machine does only ever adds time: the mean of the fastest tenth.
    fastest = {n: sorted(times)[: max(1, len(times) // 10)] for n, times in found.items()}
    return MeasuredSize(size, {n: sum(times) / len(times) for n, times in fastest.items()})
