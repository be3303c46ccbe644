"""What every batch size runs as, as rows: mode, graph, padding and reason."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from piecework.errors import StaticGraphError
from piecework.runtime.batch.descriptor import BatchDescriptor, BatchKind
from piecework.runtime.batch.dispatcher import CudagraphDispatcher, Reason
from piecework.runtime.batch.mode import CUDAGraphMode


@dataclass(frozen=True, slots=True)
class CoverageRow:
    """Consecutive sizes that run alike; ``padding`` is the most; no descriptor: uncaptured."""

    first: int
    last: int
    batch: BatchKind
    mode: CUDAGraphMode
    descriptor: BatchDescriptor | None
    padding: int
    reason: Reason
    is_fallback: bool

    @property
    def kind(self) -> str:
        batch = self.batch
        parts = ["decode" if batch.uniform_decode else "mixed"]
        if (batch.query_len or 0) > 1:
            parts.append(f"{batch.query_len} a request")
        if batch.has_lora:
            parts.append(f"{batch.num_active_loras or 'any'} adapters")
        parts += [f"{name}={value}" for name, value in batch.axes]
        return ", ".join(parts)


class Coverage(list[CoverageRow]):
    """Rows of a coverage table, which prints as one; ``note`` says why nothing is padded, if so."""

    def __init__(self, rows: Iterable[CoverageRow], note: str = "") -> None:
        super().__init__(rows)
        self.note = note

    def __repr__(self) -> str:
        cells = [("batch", "tokens", "mode", "graph", "padding", "why"), *map(_cells, self)]
        return "\n".join([aligned(cells), *([self.note] if self.note else [])])


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as text, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    pairs = (zip(row, widths, strict=True) for row in rows)
    return "\n".join("  ".join(cell.ljust(w) for cell, w in row).rstrip() for row in pairs)


def coverage(dispatcher: CudagraphDispatcher, max_num_batched_tokens: int) -> list[CoverageRow]:
    """One row per run of batch sizes that are treated alike, for every kind of batch."""
    rows: list[CoverageRow] = []
    separate = dispatcher.cudagraph_mode.separate_routine()
    decodes = (0, *dispatcher.decode_sizes) if separate else (0,)
    # Every distinct question about adapters: none, and each captured number.
    loras = dict.fromkeys([(False, 0), *dispatcher.lora])
    for step, lora, axes in itertools.product(decodes, loras, dispatcher.every_axes()):
        largest = min(max_num_batched_tokens, dispatcher.max_num_seqs * step)
        sizes = range(step, largest + 1, step) if step else range(1, max_num_batched_tokens + 1)
        batch = BatchKind(step > 0, *lora, axes, query_len=step or None)
        alike: object = None
        for size in sizes:
            found = dispatcher.explain(size, batch, strict=False)
            graph = None if found.mode is CUDAGraphMode.NONE else found.descriptor
            # A size that fits exactly and those padded to it share a graph, so they share a row.
            before, alike = alike, (found.mode, graph or found.reason)
            if before == alike:
                padding = max(rows[-1].padding, found.padding)
                rows[-1] = replace(rows[-1], last=size, padding=padding)
            else:
                how = (found.padding, found.reason, found.is_fallback)
                rows.append(CoverageRow(size, size, batch, found.mode, graph, *how))
    return rows


def require_coverage(rows: Iterable[CoverageRow]) -> None:
    """Refuse a table in which batches silently fall back to running uncaptured; they are listed."""
    gaps = [row for row in rows if row.is_fallback]
    if gaps:
        shown = "; ".join(f"{row.kind} {_span(row)}: {row.reason.value}" for row in gaps[:5])
        more = f"; and {len(gaps) - 5} more" if len(gaps) > 5 else ""
        why = f"batches would silently run uncaptured: {shown}{more}"
        hint = "capture these sizes, or choose a mode that does not promise them"
        raise StaticGraphError(why, where="coverage", hint=hint)


def _cells(row: CoverageRow) -> tuple[str, ...]:
    graph = "-" if row.descriptor is None else row.descriptor.describe()
    padding = f"≤ {row.padding}" if row.padding else "0"
    return row.kind, _span(row), row.mode.name, graph, padding, row.reason.value


def coverage_json(rows: Sequence[CoverageRow]) -> list[Mapping[str, object]]:
    return [
        {
            "kind": row.kind,
            "first": row.first,
            "last": row.last,
            "mode": row.mode.name,
            "graph": None if row.descriptor is None else row.descriptor.describe(),
            "padding": row.padding,
            "reason": row.reason.value,
            "fallback": row.is_fallback,
        }
        for row in rows
    ]


def _span(row: CoverageRow) -> str:
    return str(row.first) if row.first == row.last else f"{row.first}-{row.last}"
