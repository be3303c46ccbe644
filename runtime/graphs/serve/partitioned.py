"""A model that Inductor cut itself, with static graphs. In: a compiled entry and sizes to capture. Out: the same function, each partition replayed.

As `CapturedModel`, except that what lies between the replays is Inductor's code and not emitted source.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn

from piecework.errors import StaticGraphError
from piecework.runtime.batch.descriptor import BatchDescriptor, BatchKind
from piecework.runtime.batch.mode import CUDAGraphMode
from piecework.runtime.call.entry import Entry
from piecework.runtime.compilers.partitions import Partition, partitions_taken_by
from piecework.runtime.graphs.memory.wrapper import CUDAGraphWrapper, wrap_piece
from piecework.runtime.graphs.plan.batch_reader import FixedBatch
from piecework.runtime.graphs.plan.options import CaptureOptions
from piecework.runtime.graphs.serve.calls import Step
from piecework.runtime.graphs.serve.model import CapturedModel
from piecework.runtime.pieces.program import Program

_PIECEWISE = CUDAGraphMode.PIECEWISE


class PartitionedModel(CapturedModel):
    """Static graphs of the partitions that Inductor made of one model; see `CapturedModel`.

    Raises:
        StaticGraphError: there are no partitions to capture.
    """

    _watches = False  # splitting ops run inside Inductor's code

    def __init__(
        self,
        entry: Entry,
        program: Program,
        sizes: Iterable[int] | None,
        options: CaptureOptions,
        fixed: FixedBatch | None = None,
    ) -> None:
        self._wrappers: dict[Partition, CUDAGraphWrapper] = {}
        super().__init__(entry, program, sizes, options, fixed)
        pieces = self.dispatcher.cudagraph_keys[_PIECEWISE]
        if pieces:
            smallest = min(pieces, key=lambda each: each.num_tokens)
            with self._context_for(CUDAGraphMode.NONE, smallest):
                self._dummy(smallest)  # meets the partitions, and captures nothing
        if pieces and not self._wrappers:
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
        return wrap_piece(
            partition.run,
            is_first=partition.index == 0,
            is_last=partition.index == partition.count - 1,
            graphs=self.graphs,
            name=f"partition {partition.index} of {partition.count}",
        )

    def source_for(self, size: int, kind: BatchKind | None = None) -> NoReturn:
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

    def _run(self, flat: Sequence[object], number: int) -> object:
        with partitions_taken_by(self):
            return super()._run(flat, number)

    def _step_of(self, mode: CUDAGraphMode, descriptor: BatchDescriptor) -> Step:
        """Inductor's code calls the replays, so nothing is emitted; one replay checks every address."""
        if mode is not _PIECEWISE:
            return super()._step_of(mode, descriptor)
        with self._context_for(mode, descriptor):
            self._dummy(descriptor)
        padded, inputs = descriptor.num_tokens, self._inputs_of(descriptor)
        call = self._checked_call(mode, descriptor)
        return Step(call, padded, mode, descriptor, bring_back=inputs.bringer(padded))
