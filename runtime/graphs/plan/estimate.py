"""What captures will take: in, a few measured sizes; out, an estimate for all of them, and the sizes that fit a budget.

It never keeps what it captured to measure, and it never captures more than a few sizes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from piecework.errors import StaticGraphError
from piecework.runtime.batch.descriptor import BatchDescriptor
from piecework.runtime.batch.dispatcher import CudagraphDispatcher
from piecework.runtime.batch.mode import CUDAGraphMode
from piecework.runtime.graphs.memory.owner import StaticGraphs
from piecework.runtime.graphs.plan.phase import (
    ContextFor,
    Forward,
    Key,
    capture_graphs,
    format_bytes,
)
from piecework.runtime.observe.tables import Table

Kind = tuple[CUDAGraphMode, BatchDescriptor]


@dataclass(frozen=True, slots=True)
class MemoryModel:
    """What capturing sizes of one kind of batch takes, largest first, into an empty pool.

    The largest size pays for the pool, a fixed part and one per token; each size pays a step of its own (graph
    objects, outputs that can't share), interpolated between the measured ones.

    Attributes:
        bytes_per_token: what the pool takes for each token of the largest size.
        steps: (size, bytes) of the measured steps, ascending.
        fixed_bytes: what the pool takes whatever the size.
        each: what the driver takes for the graphs of a size, whatever the size.
    """

    bytes_per_token: float
    steps: tuple[tuple[int, int], ...] = ()
    fixed_bytes: float = 0.0
    each: float = 0.0

    @classmethod
    def fit(
        cls,
        measured: Mapping[int, int],
        alone: tuple[int, int] | None = None,
        each: float = 0.0,
    ) -> MemoryModel:
        """The model of measured sizes.

        Args:
            measured: bytes by size, captured largest first.
            alone: another size with its bytes when captured alone; tells the fixed part from the one per token.
            each: what the driver takes for each size; not in ``measured``.

        Raises:
            StaticGraphError: nothing was measured.

        Example:
            >>> MemoryModel.fit({8: 900, 4: 100, 1: 100}, alone=(1, 200))
            MemoryModel(bytes_per_token=100.0, steps=((1, 100), (4, 100)), fixed_bytes=0.0, each=0.0)
        """
        if not measured:
            raise StaticGraphError("no size was measured", where="memory estimate")
        largest = max(measured)
        steps = tuple(sorted((size, n) for size, n in measured.items() if size != largest))
        pool = max(0, measured[largest] - (_interpolate(steps, largest) if steps else 0))
        if alone is None or alone[0] == largest:
            return cls(pool / largest, steps, each=each)
        size, nbytes = alone
        small = min(pool, max(0, nbytes - (_interpolate(steps, size) if steps else 0)))
        slope = (pool - small) / (largest - size)
        fixed = max(0.0, small - slope * size)
        return cls((pool - fixed) / largest, steps, fixed, each)

    def pool(self, largest: int) -> float:
        """What the pool takes where ``largest`` is the largest size."""
        return self.fixed_bytes + self.bytes_per_token * largest

    def step(self, size: int) -> int:
        """What ``size`` adds where a larger one is captured."""
        return round(self.each) + (_interpolate(self.steps, size) if self.steps else 0)


def cost_of(chosen: Mapping[Kind, Collection[int]], models: Mapping[Kind, MemoryModel]) -> int:
    """What these sizes take together: the kinds share one pool, so only the most demanding pays for it.

    Example:
        >>> kind = (CUDAGraphMode.FULL, BatchDescriptor(0))
        >>> cost_of({kind: [8, 2]}, {kind: MemoryModel.fit({8: 900, 4: 100, 1: 100})})
        1000
    """
    pool = max(
        (models[kind].pool(max(sizes)) for kind, sizes in chosen.items() if sizes), default=0
    )
    return round(pool + sum(models[k].step(size) for k, sizes in chosen.items() for size in sizes))


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """What a planned capture will take.

    Attributes:
        rows: bytes per descriptor, in the order of capture.
        measured: the descriptors that were captured to find out.
        models: one per kind of batch: a mode, and a descriptor without its sizes.
    """

    rows: tuple[tuple[Key, int], ...]
    measured: frozenset[Key]
    models: Mapping[Kind, MemoryModel]

    @property
    def total(self) -> int:
        return sum(nbytes for _, nbytes in self.rows)

    def table(self) -> Table:
        """The estimate for a terminal."""
        table = Table(title=f"Captures will take {format_bytes(self.total)}", title_justify="left")
        table.add_column("mode")
        table.add_column("graph")
        table.add_column("memory", justify="right")
        table.add_column("known by")
        for (mode, descriptor), nbytes in self.rows:
            how = "measured" if (mode, descriptor) in self.measured else "interpolated"
            table.add_row(mode.name, descriptor.describe(), format_bytes(nbytes), how)
        return table


def estimate_memory(
    forward: Forward,
    descs: Sequence[tuple[CUDAGraphMode, Sequence[BatchDescriptor]]],
    graphs: StaticGraphs,
    *,
    warmups: int = 0,
    context_for: ContextFor | None = None,
) -> MemoryEstimate:
    """Capture the smallest size of each kind, then its largest, middle and smallest, and tell what all will take.

    What was captured is forgotten again.

    Args:
        forward: as for ``capture_graphs``.
        descs: what is planned, as the dispatcher lists it.
        graphs: the owner; it must hold no captures yet, and holds none afterwards.
        warmups: uncaptured runs before each capture.
        context_for: as for ``capture_graphs``.

    Raises:
        StaticGraphError: there are captures already, or measuring failed.
    """
    if graphs.records:
        raise StaticGraphError(
            "memory can't be estimated once graphs are captured",
            where=f"{len(graphs.records)} captures",
            hint="estimate first, or call clear_all_graphs()",
        )
    was_open = graphs.is_open
    measured: dict[Key, int] = {}
    planned: dict[Kind, list[BatchDescriptor]] = {}
    for mode, group in descs:
        for descriptor in sorted(group, key=lambda d: -d.num_tokens):
            planned.setdefault(kind_of(mode, descriptor), []).append(descriptor)
    models = {}
    for kind, group in planned.items():
        probes = [group[at] for at in sorted({0, len(group) // 2, len(group) - 1})]
        found: list[dict[Key, int]] = []
        driver: list[int] = []
        for plan in ([probes[-1]], probes):
            try:
                todo = [(kind[0], plan)]
                capture_graphs(forward, todo, graphs, warmups=warmups, context_for=context_for)
                driver.append(sum(record.driver_bytes for record in graphs.records))
                found.append(_without_driver(graphs))
            finally:
                graphs.clear_all_graphs()
                graphs.allow_capturing(was_open)
        [(smallest, alone)], together = found[0].items(), found[1]
        measured |= together
        models[kind] = MemoryModel.fit(
            {d.num_tokens: n for (_, d), n in together.items()},
            (smallest[1].num_tokens, alone),
            sum(driver) / (1 + len(probes)),
        )
    return MemoryEstimate(_rows(planned, models), frozenset(measured), models)


def _without_driver(graphs: StaticGraphs) -> dict[Key, int]:
    """What each descriptor added, but for what the driver took: that is told in coarse steps, so it is averaged over all of them."""
    left = dict(graphs.bytes_by_descriptor())
    for record in graphs.records:
        left[record.mode, record.descriptor] -= record.driver_bytes
    return left


def _rows(
    planned: Mapping[Kind, Sequence[BatchDescriptor]], models: Mapping[Kind, MemoryModel]
) -> tuple[tuple[Key, int], ...]:
    """Each descriptor with what it adds to those before it."""
    rows: list[tuple[Key, int]] = []
    before: dict[Kind, list[int]] = {}
    spent = 0
    for kind, group in planned.items():
        for descriptor in group:
            before.setdefault(kind, []).append(descriptor.num_tokens)
            total = cost_of(before, models)
            rows.append(((kind[0], descriptor), total - spent))
            spent = total
    return tuple(rows)


def choose_within_budget(
    sizes: Mapping[Kind, Collection[int]], models: Mapping[Kind, MemoryModel], budget_bytes: int
) -> dict[Kind, tuple[int, ...]]:
    """The sizes of each kind to capture with at most ``budget_bytes``.

    First the largest size that every kind can have; where not even the smallest fits, the last kind goes. Then,
    one by one, whatever saves most padding per byte.

    Example:
        >>> kind = (CUDAGraphMode.FULL, BatchDescriptor(0))
        >>> models = {kind: MemoryModel(10.0, ((1, 100), (4, 100)))}
        >>> choose_within_budget({kind: [1, 2, 4, 8]}, models, 300)[kind]
        (4, 8)
    """
    chosen = _largest_that_fit(sizes, models, budget_bytes)
    left = {(k, s) for k, own in chosen.items() for s in sizes[k] if s < own[0]}

    def worth(each: tuple[Kind, int]) -> tuple[float, int]:
        kind, size = each
        saved = padding_of(chosen[kind]) - padding_of([*chosen[kind], size])
        return saved / max(1, models[kind].step(size)), size

    while left:
        spent = cost_of(chosen, models)
        affordable = [(k, s) for k, s in left if spent + models[k].step(s) <= budget_bytes]
        if not affordable:
            break
        best = max(affordable, key=worth)
        chosen[best[0]].append(best[1])
        left.discard(best)
    return {kind: tuple(sorted(own)) for kind, own in chosen.items()}


def _largest_that_fit(
    sizes: Mapping[Kind, Collection[int]], models: Mapping[Kind, MemoryModel], budget_bytes: int
) -> dict[Kind, list[int]]:
    kinds = [kind for kind, own in sizes.items() if own]
    while kinds:
        for cap in sorted({size for kind in kinds for size in sizes[kind]}, reverse=True):
            below = {kind: [size for size in sizes[kind] if size <= cap] for kind in kinds}
            first = {kind: [max(own, default=0)] for kind, own in below.items()}
            if all(below.values()) and cost_of(first, models) <= budget_bytes:
                return first
        kinds.pop()
    return {}


def padding_of(sizes: Iterable[int]) -> int:
    """Tokens of padding when each batch size up to the largest of ``sizes`` runs once."""
    ordered = sorted(set(sizes))
    gaps = (size - before for before, size in zip([0, *ordered], ordered, strict=False))
    return sum(gap * (gap - 1) // 2 for gap in gaps)


def fit_budget(
    estimate: MemoryEstimate, dispatcher: CudagraphDispatcher, budget_bytes: int
) -> tuple[Key, ...]:
    """Give up the descriptors that do not fit ``budget_bytes``, and return them."""
    planned: dict[Kind, list[int]] = {}
    for key, _ in estimate.rows:
        planned.setdefault(kind_of(*key), []).append(key[1].num_tokens)
    chosen = choose_within_budget(planned, estimate.models, budget_bytes)
    dropped = [
        key for key, _ in estimate.rows if key[1].num_tokens not in chosen.get(kind_of(*key), ())
    ]
    for mode, descriptor in dropped:
        dispatcher.give_up(mode, descriptor)
    return tuple(dropped)


def kind_of(mode: CUDAGraphMode, descriptor: BatchDescriptor) -> Kind:
    """The kind of a descriptor: what it is besides its size."""
    return mode, replace(descriptor, num_tokens=0, num_reqs=None)


def _interpolate(points: Sequence[tuple[int, int]], at: int) -> int:
    """The value at ``at`` on the line through the nearest points, never below zero."""
    if len(points) == 1:
        return points[0][1]
    right = min(max(bisect_left(points, (at,)), 1), len(points) - 1)
    (x0, y0), (x1, y1) = points[right - 1], points[right]
    return max(0, round(y0 + (y1 - y0) * (at - x0) / (x1 - x0)))
