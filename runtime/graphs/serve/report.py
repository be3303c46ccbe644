"""What a captured model says of itself: in, estimates, captures and counted calls; out, tables for people and plain values.

It measures nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from piecework.runtime.batch.coverage import aligned
from piecework.runtime.graphs.plan.estimate import MemoryEstimate
from piecework.runtime.graphs.plan.phase import Key, format_bytes
from piecework.runtime.observe.tables import Table


@dataclass(frozen=True, slots=True, repr=False)
class MemoryReport:
    """What captures take.

    Attributes:
        estimate: what was expected before the capture; None if it was not asked for.
        held: bytes that each captured shape added.
        dropped: shapes that were given up for the budget.
    """

    estimate: MemoryEstimate | None
    held: Mapping[Key, int]
    dropped: tuple[Key, ...]

    @property
    def total(self) -> int:
        return sum(self.held.values())

    def __repr__(self) -> str:
        heading = ("mode", "graph", "expected", "held", "note")
        return (
            f"static graphs hold {format_bytes(self.total)}\n{aligned([heading, *self._cells()])}"
        )

    def table(self) -> Table:
        """The report for a terminal: expected and held memory of each shape."""
        table = Table(title=f"Static graphs hold {format_bytes(self.total)}", title_justify="left")
        for heading in ("mode", "graph", "expected", "held", "note"):
            right = heading in ("expected", "held")
            table.add_column(heading, justify="right" if right else "left")
        for row in self._cells():
            table.add_row(*row)
        return table

    def as_json(self) -> dict[str, object]:
        """The report as plain values."""
        graphs = [
            {
                "mode": key[0].name,
                "tokens": key[1].num_tokens,
                "graph": key[1].describe(),
                "expected": expected,
                "held": held,
                "dropped": key in self.dropped,
            }
            for key, expected, held in self._rows()
        ]
        return {"total": self.total, "graphs": graphs}

    def _rows(self) -> Iterator[tuple[Key, int | None, int | None]]:
        expected = {} if self.estimate is None else dict(self.estimate.rows)
        for key in dict.fromkeys([*expected, *self.held]):
            yield key, expected.get(key), self.held.get(key)

    def _cells(self) -> Iterator[tuple[str, ...]]:
        for key, *sizes in self._rows():
            note = "dropped for the budget" if key in self.dropped else ""
            texts = ["" if size is None else format_bytes(size) for size in sizes]
            yield (key[0].name, key[1].describe(), *texts, note)


@dataclass(frozen=True, slots=True)
class CallRow:
    """Calls that ran alike.

    Attributes:
        mode: ``PIECEWISE``, ``FULL`` or ``NONE``.
        graph: the graph that served them, in words; "" where they ran uncaptured.
        reason: why.
        calls: how many.
        padding: rows that they were padded by, all together.
    """

    mode: str
    graph: str
    reason: str
    calls: int
    padding: int = 0


def uncaptured_rows(calls: int, careful: Mapping[str, int]) -> list[CallRow]:
    """Rows of a model that nothing is captured of: its calls, and those that went past every shortcut."""
    plain = [CallRow("NONE", "", "nothing is captured", calls)] if calls else []
    return [*plain, *careful_rows(careful)]


def careful_rows(counts: Mapping[str, int]) -> list[CallRow]:
    """Rows of calls that went past every shortcut, from how many there were by what made them."""
    return [CallRow("NONE", "", why, calls) for why, calls in dict(counts).items()]


def calls_table(rows: Sequence[CallRow]) -> Table:
    """The rows as a table for a terminal."""
    table = Table(title="What calls ran as", title_justify="left")
    for heading in ("mode", "graph", "calls", "padding", "why"):
        table.add_column(heading, justify="right" if heading in ("calls", "padding") else "left")
    for row in rows:
        why = row.reason if row.graph else f"[yellow]{row.reason}[/]"
        table.add_row(row.mode, row.graph or "-", str(row.calls), str(row.padding), why)
    return table


def calls_json(rows: Sequence[CallRow]) -> list[dict[str, object]]:
    """The rows as plain values."""
    return [
        {"mode": row.mode, "graph": row.graph or None, "reason": row.reason, "calls": row.calls}
        for row in rows
    ]
