"""Which graph serves one call. In: a call's flat arguments and the forward context. Out: the step that serves it, counted by what it ran as and why.

It asks the dispatcher once per kind of batch and remembers the answer.
"""

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


@dataclass(eq=False, slots=True)
class Step:
    """How calls of one kind are served.

    Attributes:
        call: takes the tensor arguments and returns the static results; None runs the model uncaptured.
        padded: the captured size.
        mode: what the graph is.
        descriptor: which graph.
        reason: why these calls are served by it.
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

    Args:
        shape: where calls have their sizes.
        dispatcher: which batch runs as what.
        ready: what serves each captured descriptor.
        options: ``kind_of`` is read.

    Attributes:
        shared: counts calls that ran uncaptured as a written argument shared memory with another.
        busy: counts calls that ran uncaptured as another call was using the graphs' memory.
        inside: counts calls that ran uncaptured as somebody else was capturing them.
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
        self.shared = _uncaptured("an argument that is written to shares memory with another")
        self.busy = _uncaptured("another call is using the graphs, in a thread or around this one")
        self.inside = _uncaptured(
            "somebody else captures this call, and a replay can't be captured"
        )
        self._skipped = _uncaptured("the forward context skips graphs")
        self._told = _uncaptured("the forward context says mode NONE for this descriptor")
        self._empty = _uncaptured("the batch is empty")
        self._unequal = _uncaptured("a size that was declared to equal the batch size doesn't")

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
            return self._unequal
        kind = PLAIN
        if context is not None:
            if context.skip_cuda_graphs:
                return self._skipped
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
        """Ask the dispatcher, and remember the answer.

        Raises:
            StaticGraphError: ``strict``, and the batch would fall back to running uncaptured.
        """
        if count < 1:
            return self._empty
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
        """The step that the caller chose by itself.

        Raises:
            StaticGraphError: it is not captured, or too small for the batch.
        """
        if mode is CUDAGraphMode.NONE:
            return self._told
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
        always = (
            self.shared,
            self.busy,
            self.inside,
            self._skipped,
            self._told,
            self._empty,
            self._unequal,
        )
        totals: dict[tuple[str, str, str], tuple[int, int]] = {}
        for step in (*self._finished, *self._steps.values(), *always):
            graph = "" if step.call is None else step.descriptor.describe()
            key = (step.mode.name, graph, step.reason)
            calls, padding = totals.get(key, (0, 0))
            totals[key] = calls + step.calls, padding + step.padding
        return (CallRow(*key, *counts) for key, counts in totals.items() if counts[0])


def _uncaptured(reason: str) -> Step:
    return Step(None, 0, CUDAGraphMode.NONE, BatchDescriptor(0), reason)
