"""What a static graph is on every device: captured once, then replayed on the same memory.

``cuda`` and ``cpu`` keep this contract, and ``platforms`` picks one by device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from piecework.errors import StaticGraphError


class StaticGraph:
    """One captured callable, or none yet.

    - ``capture`` runs the callable's Python once. Outputs and mutated inputs hold what they should
      only after the first ``replay``.
    - ``replay`` reads the tensors given at capture at their addresses then, writes the outputs made
      at capture, and changes inputs in place where the callable does. Python values are frozen.
    - Outputs are overwritten by the next replay, and, once nobody holds them, by later captures
      from the same pool.
    """

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self._held: Any = None

    @property
    def captured(self) -> bool:
        """Whether there is something to replay."""
        return self._held is not None

    def capture(
        self,
        runnable: Callable[..., object],
        args: tuple[object, ...],
        kwargs: Mapping[str, object],
        *,
        weak_output: bool = False,
    ) -> object:
        """Capture ``runnable(*args, **kwargs)`` and return its output, any pytree.

        Args:
            weak_output: let go of the output inside the capture, so that the next one may reuse its
                memory; what is returned then owns nothing.

        Raises:
            StaticGraphError: the output can't be static memory, or this graph is captured already.
        """
        if self._held is not None:
            raise StaticGraphError("this static graph is captured already", hint="reset() it first")
        self._held, output = self._record(runnable, args, kwargs, weak_output)
        return output

    def _record(
        self,
        runnable: Callable[..., object],
        args: tuple[object, ...],
        kwargs: Mapping[str, object],
        weak: bool,
    ) -> tuple[object, object]:
        """What a replay needs, and the output."""
        raise NotImplementedError

    def replay(self) -> None:
        """Do the captured work again on the memory as it is now."""
        self.replay_function()()

    def replay_function(self) -> Callable[[], None]:
        """The quickest callable that replays, to be bound once; invalid after ``reset``."""
        raise NotImplementedError

    def require_captured(self) -> Any:
        """What was captured; a `StaticGraphError` if nothing was."""
        if self._held is None:
            raise StaticGraphError("nothing was captured", hint="call capture() first")
        return self._held

    def reset(self) -> None:
        """Give up what was captured; a later ``capture`` may follow."""
        self._held = None


class GraphPool:
    """The memory that the static graphs of one owner share.

    Attributes:
        nbytes: what is held for outputs (and, on CUDA, for intermediates and the graphs themselves).
        driver_bytes: of these, what the driver took for graphs, told in coarse steps.
    """

    nbytes: int
    driver_bytes: int

    def clear(self) -> None:
        """Give the memory back; every graph of the pool must have been reset."""
        raise NotImplementedError


class GraphPlatform:
    """How graphs are made on one device; by default work is done there when a call returns.

    Attributes:
        unmarked: why kernels inside graphs can't carry what they stand for; "" where they can.
        stand_in: a replay runs Python, as the CPU's does; elsewhere it is one launch.
    """

    device: torch.device
    unmarked: str
    stand_in = False

    def new_pool(self) -> GraphPool:
        raise NotImplementedError

    def new_graph(self, pool: Any, *, marked: bool = False) -> StaticGraph:
        """A graph; ``marked``: its kernels carry the statement that they were captured for."""
        raise NotImplementedError

    def computes_on(self, device: torch.device) -> bool:
        """Whether a graph records work on ``device``; elsewhere it is done once, at the capture."""
        return device == self.device

    def is_capturing(self) -> bool:
        """Whether somebody captures what this thread does now; a replay would be an error."""
        raise NotImplementedError

    def call_order(self) -> Callable[[], None] | None:
        """Lets a call that uses the graphs come after the one before on the device, if need be."""
        return None

    def release_cached_memory(self) -> None:
        """Hand back what the device's allocator only caches, so that the pool can have it."""

    def synchronize(self) -> None:
        """Wait until the device has done what was queued."""
