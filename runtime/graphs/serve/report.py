"""What a captured model says of itself: what its graphs hold, and what its calls ran as."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

from piecework.collector import collector_paused
from piecework.runtime.batch.coverage import aligned
from piecework.runtime.batch.descriptor import Key
from piecework.runtime.graphs.plan.phase import MemoryEstimate, format_bytes


@dataclass(frozen=True, slots=True, repr=False)
class MemoryReport:
    """What captures take; printed, it is a table."""

    # what was expected before the capture; None if it was not asked for
    estimate: MemoryEstimate | None
    held: Mapping[Key, int]  # bytes that each captured shape added
    dropped: tuple[Key, ...]  # shapes that were given up for the budget

    @property
    def total(self) -> int:
        return sum(self.held.values())

    def as_json(self) -> dict[str, object]:
        """The report as plain values."""
        expected = {} if self.estimate is None else dict(self.estimate.rows)
        graphs = [
            {
                "mode": key[0].name,
                "tokens": key[1].num_tokens,
                "graph": key[1].describe(),
                "expected": expected.get(key),
                "held": self.held.get(key),
                "dropped": key in self.dropped,
            }
            for key in dict.fromkeys([*expected, *self.held])
        ]
        return {"total": self.total, "graphs": graphs}

    def __repr__(self) -> str:
        cells = [("graph", "expected", "held", "note")]
        for each in self.as_json()["graphs"]:  # type: ignore[attr-defined]
            sizes = [each["expected"], each["held"]]
            texts = ["" if size is None else format_bytes(size) for size in sizes]
            note = "dropped for the budget" if each["dropped"] else ""
            cells.append((f"{each['mode']} {each['graph']}", *texts, note))
        return f"static graphs hold {format_bytes(self.total)}\n{aligned(cells)}"


@dataclass(frozen=True, slots=True)
class CallRow:
    """Calls that ran alike."""

    mode: str  # ``PIECEWISE``, ``FULL`` or ``NONE``
    graph: str  # the graph that served them, in words; "" where they ran uncaptured
    reason: str  # why
    calls: int  # how many
    padding: int = 0  # rows that they were padded by, all together


def uncaptured_rows(calls: int, careful: Mapping[str, int]) -> list[CallRow]:
    """Rows of calls without a graph: plain ones, and careful ones by their reason."""
    counts = {**({"nothing is captured": calls} if calls else {}), **careful}
    return [CallRow("NONE", "", why, calls) for why, calls in counts.items()]


def calls_text(rows: Sequence[CallRow]) -> str:
    """The rows as a table."""
    cells = [(r.mode, r.graph or "-", str(r.calls), str(r.padding), r.reason) for r in rows]
    return aligned([("mode", "graph", "calls", "padding", "why"), *cells])


def calls_json(rows: Sequence[CallRow]) -> list[dict[str, object]]:
    """The rows as plain values."""
    return [{**asdict(row), "graph": row.graph or None} for row in rows]


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
    """What `StitchedModule.measure` found on ``device`` (stand-ins on a CPU); ``str`` is a table."""

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
