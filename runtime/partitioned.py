"""A model that Inductor cut itself, with static graphs. In: a compiled entry and sizes to capture. Out: the same function, each partition replayed.

As `runtime.captured`, except that what lies between the replays is Inductor's code and not emitted source.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn

import torch

from piecework.errors import PieceworkError, StaticGraphError
from piecework.runtime.backend import PieceworkBackend
from piecework.runtime.captured import CapturedModel, CaptureOptions
from piecework.runtime.compilers.partitions import Partition, partitions_taken_by
from piecework.runtime.entry import Entry
from piecework.runtime.graphs.capture import CaptureWatcher, FailurePolicy
from piecework.runtime.graphs.descriptor import BatchDescriptor
from piecework.runtime.graphs.mode import CUDAGraphMode
from piecework.runtime.graphs.wrapper import CUDAGraphOptions, CUDAGraphWrapper

_PIECEWISE = CUDAGraphMode.PIECEWISE


class PartitionedModel(CapturedModel):
    """Static graphs of the partitions that Inductor made of one model; see `CapturedModel`.

    Raises:
        StaticGraphError: there are no partitions to capture.
    """

    def __init__(
        self,
        entry: Entry,
        backend: PieceworkBackend,
        sizes: Iterable[int] | None,
        options: CaptureOptions,
    ) -> None:
        self._wrappers: dict[Partition, CUDAGraphWrapper] = {}
        self._ready: set[int] = set()
        super().__init__(entry, backend, sizes, options)
        smallest = BatchDescriptor(min(self.sizes))
        with self._context_for(CUDAGraphMode.NONE, smallest):
            self._dummy(smallest)  # meets the partitions, and captures nothing
        if not self._wrappers:
            raise StaticGraphError(
                "Inductor made no partitions of this model's code",
                where="use_inductor_graph_partition",
                hint="it makes them for GPUs only; without that option the graph is cut before Inductor, and its pieces "
                "are captured on any device",
            )

    def run_partition(self, partition: Partition, values: tuple[object, ...]) -> object:
        """What a partition does while this model runs: it captures or replays, as the forward context says."""
        wrapper = self._wrappers.get(partition)
        if wrapper is None:
            wrapper = self._wrappers[partition] = self._wrap_partition(partition)
        return wrapper(*values)

    def _wrap_partition(self, partition: Partition) -> CUDAGraphWrapper:
        return CUDAGraphWrapper(
            partition.run,
            None,
            _PIECEWISE,
            CUDAGraphOptions(
                debug_log_enable=partition.index == 0,
                gc_disable=partition.index > 0,
                weak_ref_output=partition.index == partition.count - 1,
            ),
            graphs=self.graphs,
            name=f"partition {partition.index} of {partition.count}",
        )

    def release(self) -> None:
        self._ready.clear()
        super().release()

    def source_for(self, size: int) -> NoReturn:
        """There is none: Inductor's own code calls the replays.

        Raises:
            StaticGraphError: always.
        """
        raise StaticGraphError(
            "there is no replay source: Inductor cut this model, and its code calls the replays",
            where="use_inductor_graph_partition",
        )

    # --- what differs from pieces that were cut before ---------------------------------------------

    def _wrap(self, submods: Sequence[Callable[..., object]], number: int) -> list:  # type: ignore[type-arg]
        return list(submods)  # they hold splitting ops; only the partitions inside are captured

    def _run_wrapped(self, tensors: Sequence[torch.Tensor], size: int) -> object:
        with partitions_taken_by(self):
            return super()._run_wrapped(tensors, size)

    def _make_replay(self, descriptor: BatchDescriptor) -> None:
        """Replay once, which checks every address."""
        try:
            with self._context_for(_PIECEWISE, descriptor):
                self._dummy(descriptor)
        except PieceworkError as error:
            self.graphs.discard(_PIECEWISE, descriptor)
            self.dispatcher.give_up(_PIECEWISE, descriptor)
            self.failures[descriptor.num_tokens] = error
            if self.options.on_failure is FailurePolicy.RAISE:
                raise
            return
        self._ready.add(descriptor.num_tokens)

    def _step(self, count: int) -> tuple[Callable[..., object], int] | None:
        mode, descriptor = self.dispatcher.dispatch(count)
        served = mode is _PIECEWISE and descriptor.num_tokens in self._ready
        step = (self._checked_call(descriptor), descriptor.num_tokens) if served else None
        self._steps[count] = step
        return step


def capture_partitions(
    entry: Entry,
    backend: PieceworkBackend,
    sizes: Iterable[int] | None,
    options: CaptureOptions,
    *,
    memory_budget: int | None,
    progress: bool | CaptureWatcher,
    estimate: bool,
    keep: Callable[[CapturedModel], None],
) -> None:
    """As `piecework.runtime.captured.capture_model`, for a model that Inductor cut itself."""
    model = PartitionedModel(entry, backend, sizes, options)
    keep(model)
    model.capture(memory_budget=memory_budget, progress=progress, estimate=estimate)
