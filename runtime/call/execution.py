"""What the calls of one model use, as one frozen value, and turns for those who change it.

A call keeps the execution that it read until it returns; a change makes another and publishes it by
one assignment, so it never reaches a call that is half-way through. Nothing here waits for calls.
"""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType, FunctionType
from typing import Protocol

import torch

from piecework.errors import BindError
from piecework.runtime.call.edited import EditedSource
from piecework.runtime.watch.weights import BoundWeights


class Graphs(Protocol):
    """Static graphs of a stitching function, called like it."""

    def __call__(self, *flat: object, **submods: object) -> object: ...

    def still_reads(self, weights: BoundWeights) -> bool:
        """Whether they read the memory of these weights."""
        ...

    def release(self) -> None:
        """Give everything up, once no call is in it."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Execution:
    """What a call runs, from its first look to its return.

    Attributes:
        weights: what is bound; never changed, a rebind makes another.
        function: the emitted stitching function, over those weights in a module of its own.
        edited: the text that ``function`` was made from; None for the generated one.
        graphs: what was captured of ``function``, and serves in its place.
        beside: makes what serves in place of a stitching function and of ``graphs``, for a while; None for nothing.
        variants: the entry for calls that can't take every shortcut, made when first needed.
        counter: counts the calls of the entry, from any thread.
    """

    weights: BoundWeights
    function: FunctionType
    edited: EditedSource | None = None
    graphs: Graphs | None = None
    beside: Callable[[Callable[..., object]], Callable[..., object]] | None = None
    variants: dict[str, Callable[..., object]] = field(default_factory=dict)
    counter: itertools.count[int] = field(default_factory=itertools.count)

    @property
    def serves(self) -> Callable[..., object]:
        """What the entry calls where its source says ``execution_fn``."""
        if self.beside is not None:
            return self.beside(self.function)
        return self.function if self.graphs is None else self.graphs

    @property
    def uncaptured_calls(self) -> int:
        """How many calls ran ``function``; static graphs count for themselves."""
        # A counter says what comes next, and to ask for that would count.
        return int(repr(self.counter)[len("count(") : -1]) if self.graphs is None else 0


def by_path_of(weights: BoundWeights) -> dict[str, torch.Tensor]:
    """Weight path → tensor."""
    return {w.path: t for w, t in zip(weights.traced, weights.tensors, strict=True)}


class Changes:
    """Lets one change of a model happen at a time, and none inside another."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._thread: int | None = None
        self._what = ""

    @contextmanager
    def one(self, what: str) -> Iterator[None]:
        """Wait until other threads are done changing the model, and change it.

        Raises:
            BindError: this thread is changing it already: ``what`` was called by something that the change runs, such as a
                splitting op in a warm-up.
        """
        if self._thread == threading.get_ident():
            raise BindError(
                f"{what} was called from inside {self._what} of the same model",
                hint="call it after that has returned",
            )
        with self._turn:
            self._thread, self._what = threading.get_ident(), what
            try:
                yield
            finally:
                self._thread = None


def is_running(entry: object) -> bool:
    """Whether this thread is inside a call of ``entry``; looked up on the stack, so that calls pay nothing for it."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        # Every form of the emitted entry has this name, bound to its owner.
        if getattr(frame.f_globals.get("entry_with_care"), "__self__", None) is entry:
            return True
        frame = frame.f_back
    return False
