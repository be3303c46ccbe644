"""What captures will take, told from a few measured sizes, and the sizes that fit a budget."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

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

Kind = tuple[CUDAGraphMode, BatchDescriptor]


@dataclass(frozen=True, slots=True)
class MemoryModel:
    """What capturing sizes of one kind of batch takes, largest first, into an empty pool.

    Attributes:
        per_token: what the pool takes for each token of the largest size.
        fixed: what the pool takes whatever the size.
        steps: (size, bytes) that measured sizes add where a larger one is captured, ascending.
        each: what the driver takes for the graphs of any size.
    """

    per_token: float
    fixed: float = 0.0
    steps: tuple[tuple[int, int], ...] = ()
    each: float = 0.0

    @classmethod
    def fit(
        cls, together: Mapping[int, int], alone: tuple[int, int], each: float = 0.0
    ) -> MemoryModel:
        """The model of measured sizes.

        ``together`` are bytes by size, captured largest first; ``alone`` the smallest size by itself,
        which tells the fixed part; ``each`` what the driver takes for one.

        Example:
            >>> MemoryModel.fit({8: 1050, 2: 50}, alone=(2, 450))
            MemoryModel(per_token=100.0, fixed=200.0, steps=((2, 50),), each=0.0)
        """
        largest = max(together)
        steps = tuple(sorted((size, n) for size, n in together.items() if size != largest))
        pool = max(0, together[largest] - _interpolated(steps, largest))
        size, nbytes = alone
        if size == largest:
            return cls(pool / largest, 0.0, steps, each)
        small = min(pool, max(0, nbytes - _interpolated(steps, size)))
        slope = (pool - small) / (largest - size)
        fixed = max(0.0, small - slope * size)
        return cls((pool - fixed) / largest, fixed, steps, each)

    def step(self, size: int) -> int:
        """What ``size`` adds where a larger one is captured."""
        return round(self.each) + _interpolated(self.steps, size)


def _interpolated(points: Sequence[tuple[int, int]], at: int) -> int:
    """The value at ``at`` on the line through at most two points, never below zero."""
    if len(points) < 2:
        return points[0][1] if points else 0
    (x0, y0), (x1, y1) = points
    return max(0, round(y0 + (y1 - y0) * (at - x0) / (x1 - x0)))


def cost_of(keys: Iterable[Key], models: Mapping[Kind, MemoryModel]) -> int:
    """What these take together: the kinds share one pool, which the most demanding pays."""
    chosen: dict[Kind, list[int]] = {}
    for key in keys:
        chosen.setdefault(kind_of(*key), []).append(key[1].num_tokens)
    largest = [(models[kind], max(sizes)) for kind, sizes in chosen.items()]
    pool = max((model.fixed + model.per_token * size for model, size in largest), default=0)
    return round(pool + sum(models[k].step(size) for k, sizes in chosen.items() for size in sizes))


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """What a planned capture will take: bytes by descriptor, in the order of capture.

    ``measured`` were captured to find out; ``models`` are by kind: a mode, and no sizes.
    """

    rows: tuple[tuple[Key, int], ...]
    measured: frozenset[Key]
    models: Mapping[Kind, MemoryModel]

    @property
    def total(self) -> int:
        return sum(nbytes for _, nbytes in self.rows)

    def __str__(self) -> str:
        measured = f"{len(self.measured)} of {len(self.rows)} sizes were measured"
        return f"captures will take {format_bytes(self.total)} ({measured})"


def estimate_memory(
    forward: Forward,
    descs: Sequence[tuple[CUDAGraphMode, Sequence[BatchDescriptor]]],
    graphs: StaticGraphs,
    *,
    warmups: int = 0,
    context_for: ContextFor | None = None,
) -> MemoryEstimate:
    """Capture the smallest size of each kind, then its largest, middle and smallest, and tell.

    What was captured is forgotten again. A `StaticGraphError` where there are captures already.
    """
    if graphs.records:
        raise StaticGraphError(
            "memory can't be estimated once graphs are captured",
            where=f"{len(graphs.records)} captures",
            hint="estimate first, or call clear_all_graphs()",
        )
    was_open = graphs.is_open
    measured: set[Key] = set()
    models: dict[Kind, MemoryModel] = {}
    planned: dict[Kind, list[BatchDescriptor]] = {}
    for mode, group in descs:
        for descriptor in sorted(group, key=lambda d: -d.num_tokens):
            planned.setdefault(kind_of(mode, descriptor), []).append(descriptor)
    for kind, group in planned.items():
        probes = [group[at] for at in sorted({0, len(group) // 2, len(group) - 1})]
        found: list[dict[int, int]] = []
        driver = 0  # it is told in coarse steps, so it is averaged over all that is captured
        for plan in ([probes[-1]], probes):
            try:
                todo = [(kind[0], plan)]
                capture_graphs(forward, todo, graphs, warmups=warmups, context_for=context_for)
                found.append(dict.fromkeys((each.num_tokens for each in plan), 0))
                for record in graphs.records:
                    driver += record.driver_bytes
                    own = record.nbytes - record.driver_bytes + record.staged_bytes
                    found[-1][record.descriptor.num_tokens] += own
            finally:
                graphs.clear_all_graphs()
                graphs.is_open = was_open
        [alone] = found[0].items()
        measured.update((kind[0], each) for each in probes)
        models[kind] = MemoryModel.fit(found[1], alone, driver / (1 + len(probes)))
    keys = [(kind[0], descriptor) for kind, group in planned.items() for descriptor in group]
    costs = [cost_of(keys[:count], models) for count in range(len(keys) + 1)]
    more = (after - before for before, after in pairwise(costs))
    rows = tuple(zip(keys, more, strict=True))
    return MemoryEstimate(rows, frozenset(measured), models)


def fit_budget(
    estimate: MemoryEstimate, dispatcher: CudagraphDispatcher, budget_bytes: int
) -> tuple[Key, ...]:
    """Give up the largest sizes until the rest fits ``budget_bytes``, and return them."""
    left, dropped = [key for key, _ in estimate.rows], list[Key]()
    while left and cost_of(left, estimate.models) > budget_bytes:
        largest = max(reversed(left), key=lambda key: key[1].num_tokens)
        left.remove(largest)
        dropped.append(largest)
        dispatcher.give_up(*largest)
    return tuple(dropped)


def kind_of(mode: CUDAGraphMode, descriptor: BatchDescriptor) -> Kind:
    """The kind of a descriptor: what it is besides its size."""
    return mode, replace(descriptor, num_tokens=0, num_reqs=None)
