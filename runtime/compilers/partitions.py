"""The partitions of code that Inductor cut itself, which a captured model can take over."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Protocol

from piecework.scope import set_for


class Partition:
    """One partition; Inductor's code calls it with one list, which it empties, and takes a tuple.

    Two models whose code is the same may share it: Inductor keeps one module per text. So it holds
    no static graph itself, and asks the model that is running for one.

    Attributes:
        function: what Inductor generated.
        index: its place among the partitions of its code.
        count: how many there are.
    """

    __slots__ = ("count", "function", "index")

    def __init__(self, function: Callable[..., object], index: int, count: int) -> None:
        self.function = function
        self.index = index
        self.count = count

    def __call__(self, args: list[object]) -> object:
        taker = _TAKER.get()
        if taker is None:
            return self.function(args)
        values = tuple(args)
        args.clear()
        return taker.run_partition(self, values)

    def run(self, *values: object) -> object:
        """The generated function with plain arguments."""
        return self.function(list(values))


class PartitionTaker(Protocol):
    """Whoever runs partitions in its own way while its model runs, such as from static graphs."""

    def run_partition(self, partition: Partition, values: tuple[object, ...]) -> object: ...


_TAKER: ContextVar[PartitionTaker | None] = ContextVar("piecework_partition_taker", default=None)


def wrap_partition(function: Callable[..., object], index: int, count: int) -> Partition:
    """The hook that Inductor calls with each partition of the code that it compiled or loaded."""
    return function if isinstance(function, Partition) else Partition(function, index, count)


def partitions_taken_by(taker: PartitionTaker) -> AbstractContextManager[object]:
    """For the block, partitions that run in this context are run by ``taker``."""
    return set_for(_TAKER, taker)
