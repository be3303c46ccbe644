"""What is captured: in, a mode, sizes and cases; out, the keys of every graph, and the order to capture them in.

It never answers for one batch: that is the dispatcher's work.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from piecework.errors import ConfigError
from piecework.runtime.batch.descriptor import Axes, BatchDescriptor
from piecework.runtime.batch.mode import CUDAGraphMode
from piecework.runtime.batch.sizes import decode_sizes, padded_sizes, require_positive_sizes

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
        uniform_decode_query_len: int | Sequence[int] = 1,
        decode_multiple_of: int = 1,
        lora: LoraCases | None = None,
        axes: Mapping[str, Sequence[Hashable]] | None = None,
    ) -> None:
        self.capture_sizes = require_positive_sizes(capture_sizes)
        if max_num_seqs < 1:
            raise ConfigError(f"a batch of {max_num_seqs} requests", where="max_num_seqs")
        self.max_num_seqs = max_num_seqs
        self.decode_multiple_of = decode_multiple_of
        self.lora = LoraCases() if lora is None else lora
        self.axes = {name: tuple(values) for name, values in (axes or {}).items()}
        if any(not values for values in self.axes.values()):
            raise ConfigError("every axis needs at least one value", where="axes")
        self.initialize_cudagraph_keys(mode, uniform_decode_query_len)

    def initialize_cudagraph_keys(
        self, cudagraph_mode: CUDAGraphMode, uniform_decode_query_len: int | Sequence[int] = 1
    ) -> None:
        """Start over with another mode, for an attention backend that can't do what was configured.

        Args:
            cudagraph_mode: what decode and mixed batches use.
            uniform_decode_query_len: tokens of each request in a decode batch; several where drafts differ in width, and the
                widest is meant where a batch does not say which.
        """
        one = isinstance(uniform_decode_query_len, int)
        lens = [uniform_decode_query_len] if one else list(uniform_decode_query_len)  # type: ignore[arg-type]
        if not lens or min(lens) < 1:
            raise ConfigError(
                f"a decode batch has {', '.join(map(str, lens)) or 'no'} tokens a request",
                where="uniform_decode_query_len",
            )
        self.cudagraph_mode = cudagraph_mode
        self.uniform_decode_query_len = max(lens)
        self.cudagraph_keys: dict[CUDAGraphMode, set[BatchDescriptor]] = {
            mode: set() for mode in CAPTURING
        }
        self.bs_to_padded_graph_size = padded_sizes(self.capture_sizes)
        #: Query length of a decode batch → the sizes that such batches are captured in.
        self.decode_sizes: dict[int, tuple[int, ...]] = {
            query_len: decode_sizes(
                self.capture_sizes,
                query_len,
                max_num_seqs=self.max_num_seqs,
                multiple_of=self.decode_multiple_of,
            )
            for query_len in sorted(set(lens))
        }
        for lora, axes in itertools.product(self.lora.captured(), self._all_axes()):
            mixed = cudagraph_mode.mixed_mode()
            if mixed in CAPTURING:
                self.cudagraph_keys[mixed].update(
                    self.mixed_descriptor(mixed, size, lora, axes) for size in self.capture_sizes
                )
            if self.has_decode_graphs:
                self.cudagraph_keys[cudagraph_mode.decode_mode()].update(
                    uniform_descriptor(size, query_len, lora, axes)
                    for query_len, sizes in self.decode_sizes.items()
                    for size in sizes
                )

    @property
    def has_decode_graphs(self) -> bool:
        """Whether uniform decode batches have graphs of their own."""
        mode = self.cudagraph_mode
        return mode.separate_routine() and mode.decode_mode() is CUDAGraphMode.FULL

    def mixed_descriptor(
        self, mode: CUDAGraphMode, size: int, lora: tuple[bool, int], axes: Axes
    ) -> BatchDescriptor:
        """The key of any batch of ``size`` tokens.

        A full graph holds attention, which is captured for a number of requests: as many as there can be. Pieces don't.
        """
        reqs = min(size, self.max_num_seqs) if mode is CUDAGraphMode.FULL else None
        return BatchDescriptor(size, reqs, False, *lora, axes)

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


def uniform_descriptor(
    size: int, query_len: int, lora: tuple[bool, int], axes: Axes
) -> BatchDescriptor:
    """The key of a uniform decode batch of ``size`` tokens, ``query_len`` a request."""
    return BatchDescriptor(size, size // query_len, True, *lora, axes)


def _capture_order(key: BatchDescriptor) -> tuple[object, ...]:
    return (
        -key.num_tokens,
        -(key.num_reqs or 0),
        -key.num_active_loras,
        not key.has_lora,
        repr(key.extra),
    )
