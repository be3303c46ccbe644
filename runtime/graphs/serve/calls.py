"""Which graph serves a call, asked of the dispatcher once per kind of batch; and counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from piecework.errors import StaticGraphError
from piecework.runtime.batch.descriptor import PLAIN, BatchDescriptor, BatchKind
from piecework.runtime.batch.dispatcher import CudagraphDispatcher
from piecework.runtime.batch.forward_context import ForwardContext, current_forward_context
from piecework.runtime.batch.mode import CUDAGraphMode
from piecework.runtime.graphs.plan.batch_shape import BatchShape
from piecework.runtime.graphs.plan.options import CaptureOptions
from piecework.runtime.graphs.plan.phase import Key
from piecework.runtime.graphs.serve.report import CallRow

_ALWAYS = {
    "shared": "an argument that is written to shares memory with another",
    "busy": "another call is using the graphs, in a thread or around this one",
    "inside": "somebody else captures this call, and a replay can't be captured",
    "skipped": "the forward context skips graphs",
    "told": "the forward context says mode NONE for this descriptor",
    "empty": "the batch is empty",
    "unequal": "a size that was declared to equal the batch size doesn't",
}


@dataclass(eq=False, slots=True)
class Step:
    """How calls of one kind are served.

    Attributes:
        call: takes the tensor arguments, returns the static results; None runs uncaptured.
        padded: the captured size.
        bring_back: copies written arguments back, if there are any.
        calls: how many were served.
        count: their batch size, where that is known.
    """

    call: Callable[..., object] | None
    padded: int
    mode: CUDAGraphMode
    descriptor: BatchDescriptor
    reason: str = ""
    bring_back: Callable[..., None] | None = None
    calls: int = 0
    count: int = 0

    @property
    def padding(self) -> int:
        """Rows that were computed for nobody, over all calls."""
        return self.calls * (self.padded - self.count) if self.call is not None else 0


class Calls:
    """Finds the step of each call.

    Attributes:
        always: counts calls that run uncaptured whatever their size, by `_ALWAYS`.
    """

    def __init__(
        self,
        shape: BatchShape,
        dispatcher: CudagraphDispatcher,
        ready: Mapping[Key, Step],
        options: CaptureOptions,
    ) -> None:
        self._shape, self._dispatcher, self._ready = shape, dispatcher, ready
        self._kind_of = options.kind_of
        first = shape.dynamic[0]
        self._place = (first.position, first.dim)
        self._asks = bool(shape.others or shape.equal) or options.kind_of is not None
        self._steps: dict[object, Step] = {}
        self._finished: list[Step] = []
        self.always = {name: _uncaptured(reason) for name, reason in _ALWAYS.items()}

    def step_for(self, flat: Sequence[object]) -> tuple[Step, int]:
        """What serves a call, and its batch size."""
        position, dim = self._place
        count: int = flat[position].shape[dim]  # type: ignore[attr-defined]
        context = current_forward_context()
        if context is None and not self._asks:
            step = self._steps.get(count)
            return (self._find(count, PLAIN, count) if step is None else step), count
        return self._asked(count, context, flat), count

    def _asked(self, count: int, context: ForwardContext | None, flat: Sequence[object]) -> Step:
        if any(each.of(flat) != count for each in self._shape.equal):
            return self.always["unequal"]
        kind = PLAIN
        if context is not None:
            if context.skip_cuda_graphs:
                return self.always["skipped"]
            if context.batch_descriptor is not None:
                return self._chosen(count, context.cudagraph_runtime_mode, context.batch_descriptor)
            kind = context.batch or kind
        if self._kind_of is not None and kind is PLAIN:
            kind = self._kind_of(**{e.name: flat[e.position] for e in self._shape.staged})
        if self._shape.others:
            sizes = tuple((other.label, other.of(flat)) for other in self._shape.others)
            kind = replace(kind, axes=(*kind.axes, *sizes))
        key: object = count if kind is PLAIN else (count, kind)
        step = self._steps.get(key)
        return self._find(count, kind, key) if step is None else step

    def _find(self, count: int, kind: BatchKind, key: object) -> Step:
        """Ask the dispatcher, which may be strict, and remember the answer."""
        if count < 1:
            return self.always["empty"]
        found = self._dispatcher.explain(count, kind)
        ready = self._ready.get((found.mode, found.descriptor))
        step = (
            _uncaptured(found.reason.value)
            if ready is None
            else replace(ready, reason=found.reason.value, count=count)
        )
        self._steps[key] = step
        return step

    def _chosen(self, count: int, mode: CUDAGraphMode, descriptor: BatchDescriptor) -> Step:
        """The step that the caller chose by itself, if it is captured and large enough."""
        if mode is CUDAGraphMode.NONE:
            return self.always["told"]
        key = (mode, descriptor, count)
        step = self._steps.get(key)
        if step is not None:
            return step
        ready = self._ready.get((mode, descriptor))
        exact = self._dispatcher.exact and count != descriptor.num_tokens
        if ready is None or count > descriptor.num_tokens or exact:
            what = "is not captured" if ready is None else f"can't serve a batch of {count}"
            raise StaticGraphError(
                f"the forward context asks for {mode.name} {descriptor.describe()}, which {what}",
                where="forward context",
                hint="take mode and descriptor from stitched.dispatch(size), or set neither",
            )
        self._steps[key] = step = replace(ready, reason="the forward context chose it", count=count)
        return step

    def forget(self) -> None:
        """Ask again from now on: what is captured has changed. Counts stay."""
        self._finished += [step for step in tuple(self._steps.values()) if step.calls]
        self._steps.clear()

    def rows(self) -> Iterator[CallRow]:
        """The counts so far, one row for each graph and reason."""
        totals: dict[tuple[str, str, str], tuple[int, int]] = {}
        for step in (*self._finished, *self._steps.values(), *self.always.values()):
            graph = "" if step.call is None else step.descriptor.describe()
            key = (step.mode.name, graph, step.reason)
            calls, padding = totals.get(key, (0, 0))
            totals[key] = calls + step.calls, padding + step.padding
        return (CallRow(*key, *counts) for key, counts in totals.items() if counts[0])


def _uncaptured(reason: str) -> Step:
    return Step(None, 0, CUDAGraphMode.NONE, BatchDescriptor(0), reason)
