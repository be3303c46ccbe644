"""The capture phase: every descriptor, largest first, what that will take, and a report."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol

from piecework.errors import PieceworkError, StaticGraphError
from piecework.runtime.batch.descriptor import BatchDescriptor, Key
from piecework.runtime.batch.dispatcher import CudagraphDispatcher
from piecework.runtime.batch.forward_context import set_forward_context
from piecework.runtime.batch.mode import CUDAGraphMode
from piecework.runtime.graphs.memory.addresses import Policy
from piecework.runtime.graphs.memory.owner import StaticGraphs, failed_capture
from piecework.runtime.observe.progress import StepBar
from piecework.scope import own_random_numbers

with own_random_numbers():
    from rich.console import Console
    from rich.progress import TextColumn, TimeRemainingColumn

Forward = Callable[[BatchDescriptor], object]
ContextFor = Callable[[CUDAGraphMode, BatchDescriptor], AbstractContextManager[object]]


class FailurePolicy(Policy):
    """What a failed capture does: RAISE it, or leave that descriptor UNCAPTURED and go on."""

    RAISE = "raise"
    UNCAPTURED = "uncaptured"


class CaptureWatcher(Protocol):
    """Who is told how the capture phase goes."""

    def started(self, total: int) -> None: ...

    def finished(self, outcome: CaptureOutcome, held_bytes: int) -> None: ...

    def ended(self) -> None: ...


@dataclass(frozen=True, slots=True)
class CaptureOutcome:
    key: Key
    seconds: float  # of warm-ups and capture
    nbytes: int  # that it added
    pieces: int
    eager: tuple[str, ...] = ()  # pieces that run uncaptured, with the reason
    error: PieceworkError | None = None  # why nothing was captured

    @property
    def captured(self) -> bool:
        return self.error is None

    @property
    def text(self) -> str:
        """``PIECEWISE tokens=4: captured, 0.03 s``, or why it was not."""
        result = "captured" if self.captured else f"not captured: {self.error}"
        return f"{text_of(self.key)}: {result}, {self.seconds:.2f} s"


@dataclass(frozen=True, slots=True)
class CaptureReport:
    """The whole capture phase; ``str`` of it is a line for each descriptor."""

    outcomes: tuple[CaptureOutcome, ...]
    nbytes: int
    unmarked: str = ""  # why kernels inside the graphs don't carry what they stand for, if so

    @property
    def captured(self) -> tuple[Key, ...]:
        return tuple(each.key for each in self.outcomes if each.captured)

    def __str__(self) -> str:
        lines = ["; ".join((each.text, *each.eager)) for each in self.outcomes]
        marks = [f"kernels carry no layer: {self.unmarked}"] if self.unmarked else []
        return "\n".join([*lines, *marks])


def text_of(key: Key) -> str:
    """``PIECEWISE tokens=4``."""
    return f"{key[0].name} {key[1].describe()}"


def plain_context(
    mode: CUDAGraphMode, descriptor: BatchDescriptor
) -> AbstractContextManager[object]:
    return set_forward_context(cudagraph_runtime_mode=mode, batch_descriptor=descriptor)


def capture_graphs(
    forward: Forward,
    descs: Iterable[tuple[CUDAGraphMode, Sequence[BatchDescriptor]]],
    graphs: StaticGraphs,
    *,
    warmups: int = 0,
    context_for: ContextFor = plain_context,
    dispatcher: CudagraphDispatcher | None = None,
    on_failure: FailurePolicy | str = FailurePolicy.RAISE,
    watcher: CaptureWatcher | None = None,
    affordable: Callable[[Key], bool] | None = None,
) -> CaptureReport:
    """Capture all, largest first, and close capturing; ``context_for`` makes a run's context."""
    on_failure = FailurePolicy.parse(on_failure)
    keys = [(mode, d) for mode, group in descs for d in sorted(group, key=lambda d: -d.num_tokens)]
    outcomes: list[CaptureOutcome] = []
    if watcher is not None:
        watcher.started(len(keys))
    try:
        with graphs.capturing():
            gc.collect()
            for key in keys:
                if affordable is not None and not affordable(key):
                    continue
                outcome = _capture(key, forward, graphs, warmups, context_for)
                outcomes.append(outcome)
                if watcher is not None:
                    watcher.finished(outcome, graphs.nbytes)
                if outcome.error is not None and on_failure is FailurePolicy.RAISE:
                    raise outcome.error
    finally:
        captured = {each.key for each in outcomes if each.captured}
        for key in keys if dispatcher is not None else ():
            if key not in captured:
                dispatcher.give_up(*key)  # type: ignore[union-attr]
        if watcher is not None:
            watcher.ended()
    return CaptureReport(tuple(outcomes), graphs.nbytes, graphs.unmarked)


def _capture(
    key: Key, forward: Forward, graphs: StaticGraphs, warmups: int, context_for: ContextFor
) -> CaptureOutcome:
    """Warm up and capture; on any failure forget what was captured of this descriptor."""
    start, first = time.perf_counter(), len(graphs.records)
    error: PieceworkError | None = None
    try:
        for mode in (CUDAGraphMode.NONE,) * warmups + key[:1]:
            with context_for(mode, key[1]):
                forward(key[1])
        graphs.platform.synchronize()
        if not graphs.records[first:]:
            why = "the forward captured nothing"
            hint = "wrap the model or its pieces for this mode, and warm up as they expect"
            raise StaticGraphError(why, where=text_of(key), hint=hint)
    except BaseException as failure:
        graphs.discard(*key)
        if not isinstance(failure, Exception):
            raise
        if isinstance(failure, PieceworkError):
            error = failure
        else:
            error = failed_capture(failure, text_of(key))
            error.__cause__ = failure
    records = graphs.records[first:] if error is None else []
    return CaptureOutcome(
        key,
        time.perf_counter() - start,
        sum(record.nbytes + record.staged_bytes for record in records),
        sum(record.eager_reason is None for record in records),
        tuple(f"{r.name}: {r.eager_reason}" for r in records if r.eager_reason is not None),
        error,
    )


def format_bytes(nbytes: int) -> str:
    amount = float(nbytes)
    for unit in ("B", "KiB", "MiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.2f} GiB"


class CaptureProgress:
    """A bar with the time left and the memory held, or plain lines where there is no terminal."""

    def __init__(self, console: Console) -> None:
        held = TextColumn("{task.fields[memory]}")
        self._bar = StepBar(console, "capturing", TimeRemainingColumn(), held)

    def started(self, total: int) -> None:
        self._bar.started(total, memory=format_bytes(0))

    def finished(self, outcome: CaptureOutcome, held_bytes: int) -> None:
        memory = format_bytes(held_bytes)
        self._bar.finished(text_of(outcome.key), f"{outcome.text}, {memory} held", memory=memory)

    def ended(self) -> None:
        self._bar.ended()


# --- what captures will take ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MemoryModel:
    """What sizes of one kind of batch take, captured largest first into an empty pool."""

    pool: float  # of the largest, per token
    graph: float  # of each graph
    token: float = 0.0  # and of each of its tokens, as a segment holds but some sizes

    def step_of(self, size: int) -> float:
        """What ``size`` adds where a larger one is captured."""
        return max(0.0, self.graph + self.token * size)


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    rows: tuple[tuple[Key, int], ...]  # bytes by descriptor, in the order of capture
    measured: frozenset[Key]  # captured to find out
    models: Mapping[Key, MemoryModel]  # by kind: a mode, and no sizes

    @property
    def total(self) -> int:
        return sum(nbytes for _, nbytes in self.rows)

    def __str__(self) -> str:
        measured = f"{len(self.measured)} of {len(self.rows)} sizes were measured"
        return f"captures will take {format_bytes(self.total)} ({measured})"


def cost_of(keys: Sequence[Key], models: Mapping[Key, MemoryModel]) -> int:
    """What these take together: the kinds share one pool, which the most demanding pays."""
    pairs = [(models[kind_of(key)], key[1].num_tokens) for key in keys]
    pool = max((model.pool * size for model, size in pairs), default=0)
    return round(pool + sum(model.step_of(size) for model, size in pairs))


def estimate_memory(
    forward: Forward,
    descs: Sequence[tuple[CUDAGraphMode, Sequence[BatchDescriptor]]],
    graphs: StaticGraphs,
    *,
    warmups: int = 0,
    context_for: ContextFor = plain_context,
) -> MemoryEstimate:
    """Capture four sizes of each kind, the largest among them, tell, and forget them."""
    if graphs.records:
        why = "memory can't be estimated once graphs are captured"
        hint = "estimate first, or call clear_all_graphs()"
        raise StaticGraphError(why, where=f"{len(graphs.records)} captures", hint=hint)
    was_open = graphs.is_open
    models: dict[Key, MemoryModel] = {}
    measured: set[Key] = set()
    planned: dict[Key, list[Key]] = {}
    for mode, descriptors in descs:
        for each in sorted(descriptors, key=lambda d: -d.num_tokens):
            planned.setdefault(kind_of((mode, each)), []).append((mode, each))
    for kind, group in planned.items():
        last = len(group) - 1
        probes = [group[at] for at in sorted({0, last // 2, 3 * last // 4, last})]
        took = dict.fromkeys(probes, 0)
        driver = 0  # it is told in coarse steps, so it is averaged
        try:
            todo = [(kind[0], [descriptor for _, descriptor in probes])]
            capture_graphs(forward, todo, graphs, warmups=warmups, context_for=context_for)
            for record in graphs.records:
                driver += record.driver_bytes
                took[record.key] += record.nbytes - record.driver_bytes + record.staged_bytes
        finally:
            graphs.clear_all_graphs()
            graphs.is_open = was_open
        measured.update(probes)
        (largest, first), *others = ((key[1].num_tokens, took[key]) for key in probes)
        (size, more), (small, least) = (others[0], others[-1]) if others else ((0, 0), (0, 0))
        token = (more - least) / (size - small) if size > small else 0.0
        pool = max(0.0, first - max(0.0, least + token * (largest - small))) / largest
        graph = least - token * small + driver / len(probes)
        models[kind] = MemoryModel(pool, graph, token)
    keys = [key for group in planned.values() for key in group]
    costs = [cost_of(keys[:count], models) for count in range(len(keys) + 1)]
    more = (after - before for before, after in pairwise(costs))
    return MemoryEstimate(tuple(zip(keys, more, strict=True)), frozenset(measured), models)


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


def kind_of(key: Key) -> Key:
    """The kind of a descriptor: what it is besides its size."""
    return key[0], replace(key[1], num_tokens=0, num_reqs=None)
