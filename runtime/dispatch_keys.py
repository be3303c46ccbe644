"""What is captured: in, a mode, sizes and cases; out, the keys of every graph, and the order to capture them in.

It never answers for one batch: that is the dispatcher's work.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from piecework.errors import ConfigError
from piecework.runtime.graphs.descriptor import Axes, BatchDescriptor
from piecework.runtime.graphs.mode import CUDAGraphMode
from piecework.runtime.graphs.sizes import padded_sizes

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


class CapturedKeys:
    """The captured shapes of one model; arguments as for `CudagraphDispatcher`."""

    def __init__(
        self,
        mode: CUDAGraphMode,
        capture_sizes: Iterable[int],
        *,
        max_num_seqs: int,
        uniform_decode_query_len: int = 1,
        lora: LoraCases | None = None,
        axes: Mapping[str, Sequence[Hashable]] | None = None,
    ) -> None:
        self.capture_sizes = tuple(sorted(set(capture_sizes)))
        if any(size < 1 for size in self.capture_sizes):
            raise ConfigError(
                f"capture sizes must be positive: {list(self.capture_sizes)}",
                where="cudagraph_capture_sizes",
            )
        self.max_num_seqs = max_num_seqs
        self.lora = LoraCases() if lora is None else lora
        self.axes = {name: tuple(values) for name, values in (axes or {}).items()}
        if any(not values for values in self.axes.values()):
            raise ConfigError("every axis needs at least one value", where="axes")
        self.initialize_cudagraph_keys(mode, uniform_decode_query_len)

    def initialize_cudagraph_keys(
        self, cudagraph_mode: CUDAGraphMode, uniform_decode_query_len: int = 1
    ) -> None:
        """Start over with another mode, for an attention backend that can't do what was configured."""
        if uniform_decode_query_len < 1:
            raise ConfigError(
                f"a decode batch has {uniform_decode_query_len} tokens a request",
                where="uniform_decode_query_len",
            )
        self.cudagraph_mode = cudagraph_mode
        self.uniform_decode_query_len = uniform_decode_query_len
        self.cudagraph_keys: dict[CUDAGraphMode, set[BatchDescriptor]] = {
            mode: set() for mode in CAPTURING
        }
        self.bs_to_padded_graph_size = padded_sizes(self.capture_sizes)
        largest_decode = self.max_num_seqs * uniform_decode_query_len
        self.uniform_sizes = tuple(
            size
            for size in self.capture_sizes
            if size <= largest_decode and size % uniform_decode_query_len == 0
        )
        for (has_lora, loras), axes in itertools.product(self.lora.captured(), self._all_axes()):
            if cudagraph_mode.mixed_mode() in CAPTURING:
                for size in self.capture_sizes:
                    key = BatchDescriptor(size, None, False, has_lora, loras, axes)
                    self.cudagraph_keys[cudagraph_mode.mixed_mode()].add(key)
            if self.has_decode_graphs:
                for size in self.uniform_sizes:
                    key = self.uniform_descriptor(size, has_lora, loras, axes)
                    self.cudagraph_keys[cudagraph_mode.decode_mode()].add(key)

    @property
    def has_decode_graphs(self) -> bool:
        """Whether uniform decode batches have graphs of their own."""
        mode = self.cudagraph_mode
        return mode.separate_routine() and mode.decode_mode() is CUDAGraphMode.FULL

    def uniform_descriptor(
        self, size: int, has_lora: bool, num_active_loras: int, axes: Axes
    ) -> BatchDescriptor:
        """The key of a uniform decode batch of ``size`` tokens."""
        reqs = size // self.uniform_decode_query_len
        return BatchDescriptor(size, reqs, True, has_lora, num_active_loras, axes)

    def _all_axes(self) -> list[Axes]:
        names = sorted(self.axes)
        values = itertools.product(*(self.axes[name] for name in names))
        return [tuple(zip(names, each, strict=True)) for each in values]

    def get_capture_descs(self) -> list[tuple[CUDAGraphMode, list[BatchDescriptor]]]:
        """What to capture, PIECEWISE before FULL, largest first (smaller ones reuse the memory)."""
        return [
            (mode, sorted(self.cudagraph_keys[mode], key=_capture_order))
            for mode in CAPTURING
            if self.cudagraph_keys[mode]
        ]

    def give_up(self, mode: CUDAGraphMode, descriptor: BatchDescriptor) -> None:
        """Never dispatch to this key again: its capture failed, was interrupted or does not fit in memory."""
        self.cudagraph_keys[mode].discard(descriptor)


def _capture_order(key: BatchDescriptor) -> tuple[object, ...]:
    return (-key.num_tokens, -key.num_active_loras, not key.has_lora, repr(key.extra))
