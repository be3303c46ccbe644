"""What is captured: the keys of every graph, for sizes, adapters and further axes."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass

from piecework.errors import ConfigError
from piecework.runtime.batch.descriptor import Axes, BatchDescriptor
from piecework.runtime.batch.mode import CUDAGraphMode

CAPTURING = (CUDAGraphMode.PIECEWISE, CUDAGraphMode.FULL)


@dataclass(frozen=True, slots=True)
class LoraCases:
    """What is captured for adapters.

    Attributes:
        enabled: adapters may be active.
        specialize: capture a separate graph for batches without adapters; otherwise they run in the one with.
        counts: numbers of active adapters to capture for, ascending; empty means one graph for any number.

    Example:
        >>> LoraCases(enabled=True, counts=(1, 4)).key(True, 3)
        (True, 4)
    """

    enabled: bool = False
    specialize: bool = True
    counts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if list(self.counts) != sorted(set(self.counts)) or any(n < 1 for n in self.counts):
            raise ConfigError(
                f"numbers of active adapters must ascend from 1, not {list(self.counts)}",
                where="LoraCases.counts",
            )

    def captured(self) -> tuple[tuple[bool, int], ...]:
        """The (has_lora, num_active_loras) pairs that get graphs."""
        if not self.enabled:
            return ((False, 0),)
        active = tuple((True, count) for count in self.counts) or ((True, 0),)
        return ((False, 0), *active) if self.specialize else active

    def key(self, has_lora: bool, num_active_loras: int) -> tuple[bool, int] | None:
        """The captured pair that a batch runs in, or None."""
        if not has_lora and (not self.enabled or self.specialize):
            return (False, 0)
        if not self.enabled:
            return None
        if not self.counts:
            return (True, 0)
        return next(((True, n) for n in self.counts if n >= num_active_loras), None)


@dataclass(frozen=True, slots=True)
class CapturedCases:
    """What is captured besides sizes and modes.

    Attributes:
        max_num_seqs: most requests in a batch; decode graphs never exceed it.
        lora: which cases are captured for adapters.
        axes: further axes of the descriptor, each with the values to capture; the first is the default.
    """

    max_num_seqs: int
    lora: LoraCases
    axes: Mapping[str, tuple[Hashable, ...]]

    def __post_init__(self) -> None:
        if self.max_num_seqs < 1:
            raise ConfigError(f"a batch of {self.max_num_seqs} requests", where="max_num_seqs")
        if any(not values for values in self.axes.values()):
            raise ConfigError("every axis needs at least one value", where="axes")

    def every_axes(self) -> list[Axes]:
        """Every combination of values of the axes."""
        names = sorted(self.axes)
        values = itertools.product(*(self.axes[name] for name in names))
        return [tuple(zip(names, each, strict=True)) for each in values]

    def keys(
        self, mode: CUDAGraphMode, sizes: Iterable[int], decode: Mapping[int, Iterable[int]]
    ) -> dict[CUDAGraphMode, set[BatchDescriptor]]:
        """The keys of every graph, by its mode; ``decode`` has the sizes of decode batches by their query length."""
        found: dict[CUDAGraphMode, set[BatchDescriptor]] = {each: set() for each in CAPTURING}
        mixed = mode.mixed_mode()
        for lora, axes in itertools.product(self.lora.captured(), self.every_axes()):
            if mixed in CAPTURING:
                found[mixed].update(self.mixed(mixed, size, lora, axes) for size in sizes)
            if has_decode_graphs(mode):
                found[CUDAGraphMode.FULL].update(
                    uniform_descriptor(size, query_len, lora, axes)
                    for query_len, fitting in decode.items()
                    for size in fitting
                )
        return found

    def mixed(
        self, mode: CUDAGraphMode, size: int, lora: tuple[bool, int], axes: Axes
    ) -> BatchDescriptor:
        """The key of any batch of ``size`` tokens.

        A full graph holds attention, which is captured for a number of requests: as many as there can be. Pieces don't.
        """
        reqs = min(size, self.max_num_seqs) if mode is CUDAGraphMode.FULL else None
        return BatchDescriptor(size, reqs, False, *lora, axes)


def has_decode_graphs(mode: CUDAGraphMode) -> bool:
    """Whether uniform decode batches have graphs of their own."""
    return mode.separate_routine() and mode.decode_mode() is CUDAGraphMode.FULL


def uniform_descriptor(
    size: int, query_len: int, lora: tuple[bool, int], axes: Axes
) -> BatchDescriptor:
    """The key of a uniform decode batch of ``size`` tokens, ``query_len`` a request."""
    return BatchDescriptor(size, size // query_len, True, *lora, axes)


def capture_order(key: BatchDescriptor) -> tuple[object, ...]:
    """Larger ones first: smaller ones reuse their memory."""
    return (
        -key.num_tokens,
        -(key.num_reqs or 0),
        -key.num_active_loras,
        not key.has_lora,
        repr(key.extra),
    )
