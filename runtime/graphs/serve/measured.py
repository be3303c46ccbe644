"""Whether graphs are worth it. In: ways to serve one batch size, as callables. Out: the time of each in one interleaved run, and the one to use.

It decides by what it measured alone, and changes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from piecework.collector import collector_paused
from piecework.runtime.observe.tables import Table

#: A way is not used that took so much more time than another, as a part of that.
SLACK = 0.02
EAGER, STITCHED, CAPTURED = "eager", "stitched", "captured"


@dataclass(frozen=True, slots=True)
class MeasuredSize:
    """One batch size.

    Attributes:
        size: the batch size.
        seconds: way → seconds of a call, in the fastest tenth of its rounds.
    """

    size: int
    seconds: Mapping[str, float]

    @property
    def best(self) -> str:
        """The way to use: captured, else stitched, unless another was faster by more than `SLACK`."""
        fastest = min(self.seconds.values())
        ways = (each for each in (CAPTURED, STITCHED, EAGER) if each in self.seconds)
        return next(each for each in ways if self.seconds[each] <= fastest * (1 + SLACK))


@dataclass(frozen=True, slots=True)
class Measurement:
    """What `StitchedModule.measure` found.

    Attributes:
        rows: one for each batch size.
        device: where it ran; on a CPU, what is captured is a stand-in for testing.
    """

    rows: tuple[MeasuredSize, ...]
    device: str

    @property
    def worth_capturing(self) -> tuple[int, ...]:
        """The sizes of which no graph was slower than another way."""
        slower = {row.size for row in self.rows if row.best != CAPTURED}
        return tuple(sorted({row.size for row in self.rows} - slower))

    def table(self) -> Table:
        """The rows for a terminal."""
        table = Table(title="µs a call", title_justify="left")
        for heading in ("size", EAGER, STITCHED, CAPTURED, "use"):
            table.add_column(heading, justify="right")
        for row in self.rows:
            times = (row.seconds.get(each) for each in (EAGER, STITCHED, CAPTURED))
            cells = ["-" if each is None else f"{each * 1e6:.0f}" for each in times]
            table.add_row(str(row.size), *cells, row.best)
        if self.device == "cpu":
            table.caption = "static graphs on a CPU are a stand-in for testing"
        return table


def measured(
    size: int,
    ways: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> MeasuredSize:
    """Time each way in turn until ``seconds`` are over, after one call of each; garbage collection is off meanwhile."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for call in ways.values():
        call()
    with collector_paused():
        end, order = clock() + seconds, list(ways)
        while clock() < end or len(found[order[0]]) < 3:
            for name in order:
                _wait(device)
                start = clock()
                ways[name]()
                _wait(device)
                found[name].append(clock() - start)
            order.reverse()
    return MeasuredSize(size, {name: _undisturbed(times) for name, times in found.items()})


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _undisturbed(times: list[float]) -> float:
    """The mean of the fastest tenth: whatever else the machine does only ever adds time."""
    fastest = sorted(times)[: max(1, len(times) // 10)]
    return sum(fastest) / len(fastest)
