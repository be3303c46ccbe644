"""Static graphs of the partitions that Inductor cut itself; its own code calls the replays."""

from __future__ import annotations

from piecework.runtime.batch.mode import CUDAGraphMode
from piecework.runtime.compilers.partitions import Partition
from piecework.runtime.graphs.memory.owner import StaticGraphs
from piecework.runtime.graphs.memory.wrapper import CUDAGraphOptions, CUDAGraphWrapper


class Partitions:
    """The partitions that were met so far, each with what captures it."""

    def __init__(self, graphs: StaticGraphs) -> None:
        self._graphs = graphs
        self.wrappers: dict[Partition, CUDAGraphWrapper] = {}

    def run_partition(self, partition: Partition, values: tuple[object, ...]) -> object:
        """Capture, replay or run a partition, as the forward context says."""
        wrapper = self.wrappers.get(partition)
        if wrapper is None:
            first, last = partition.index == 0, partition.index == partition.count - 1
            wrapper = self.wrappers[partition] = CUDAGraphWrapper(
                partition.run,
                None,
                CUDAGraphMode.PIECEWISE,
                CUDAGraphOptions(first, not first, last),
                self._graphs,
                f"partition {partition.index} of {partition.count}",
            )
        return wrapper(*values)
