"""Which captured graph runs a batch: in, the batch's size and kind; out, a mode and a descriptor, with the reason.

It never captures, never rounds down, and never changes what it is asked with.
"""

from __future__ import annotations

import enum
import itertools
from bisect import bisect_left
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from piecework.errors import ConfigError, InputError, StaticGraphError
from piecework.runtime.graphs.descriptor import BatchDescriptor
from piecework.runtime.graphs.mode import CUDAGraphMode
from piecework.runtime.graphs.sizes import padded_sizes

_CAPTURING = (CUDAGraphMode.PIECEWISE, CUDAGraphMode.FULL)
Axes = tuple[tuple[str, Hashable], ...]


class Reason(enum.Enum):
    """Why a batch runs as it does."""

    EXACT = "its size is captured"
    PADDED = "padded to the next captured size"
    MODE = "the mode captures nothing for this kind of batch"
    EXCLUDED = "the caller excluded the modes it is captured in"
    TOO_LARGE = "larger than every captured size"
    NO_LORA = "no graph is captured for this many adapters"
    NOT_CAPTURED = "its graph was not captured, or was given up"


# What nobody asked for: the batch could have run captured.
_FALLBACKS = frozenset({Reason.NO_LORA, Reason.NOT_CAPTURED})


@dataclass(frozen=True, slots=True)
class Dispatch:
    """How one batch runs.

    Attributes:
        mode: NONE, PIECEWISE or FULL.
        descriptor: the captured shape, or for NONE the batch's own.
        padding: tokens added to reach it.
        reason: why.
        is_fallback: the batch runs uncaptured although its mode promises a graph.
    """

    mode: CUDAGraphMode
    descriptor: BatchDescriptor
    padding: int
    reason: Reason
    is_fallback: bool = False


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


class DispatchSettings(Protocol):
    """What the dispatcher reads of a resolved compilation configuration."""

    @property
    def cudagraph_mode(self) -> CUDAGraphMode: ...

    @property
    def cudagraph_capture_sizes(self) -> Sequence[int] | None: ...

    @property
    def cudagraph_specialize_lora(self) -> bool: ...


class BatchLimits(Protocol):
    """What the dispatcher reads of the run-time configuration."""

    @property
    def max_num_seqs(self) -> int: ...

    @property
    def uniform_decode_query_len(self) -> int: ...

    @property
    def enable_lora(self) -> bool: ...


class CudagraphDispatcher:
    """The captured shapes of one model, and which of them a batch runs as.

    Args:
        mode: what decode and mixed batches use.
        capture_sizes: sizes in tokens.
        max_num_seqs: most requests in a batch; decode graphs never exceed it.
        uniform_decode_query_len: tokens of each request in a decode batch.
        lora: which cases are captured for adapters.
        axes: further axes of the descriptor, each with the values to capture; the first is the default.
        strict: a fall-back to NONE that nobody asked for is an error.

    Example:
        >>> d = CudagraphDispatcher(CUDAGraphMode.PIECEWISE, [1, 8], max_num_seqs=8)
        >>> mode, descriptor = d.dispatch(3)
        >>> mode.name, descriptor.num_tokens
        ('PIECEWISE', 8)
    """

    def __init__(
        self,
        mode: CUDAGraphMode,
        capture_sizes: Iterable[int],
        *,
        max_num_seqs: int,
        uniform_decode_query_len: int = 1,
        lora: LoraCases | None = None,
        axes: Mapping[str, Sequence[Hashable]] | None = None,
        strict: bool = False,
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
        self.strict = strict
        self.initialize_cudagraph_keys(mode, uniform_decode_query_len)

    @classmethod
    def from_config(
        cls,
        config: DispatchSettings,
        limits: BatchLimits,
        *,
        lora_counts: tuple[int, ...] = (),
        axes: Mapping[str, Sequence[Hashable]] | None = None,
        strict: bool = False,
    ) -> CudagraphDispatcher:
        """The dispatcher of a resolved configuration."""
        return cls(
            config.cudagraph_mode,
            config.cudagraph_capture_sizes or (),
            max_num_seqs=limits.max_num_seqs,
            uniform_decode_query_len=limits.uniform_decode_query_len,
            lora=LoraCases(limits.enable_lora, config.cudagraph_specialize_lora, lora_counts),
            axes=axes,
            strict=strict,
        )

    def initialize_cudagraph_keys(
        self, cudagraph_mode: CUDAGraphMode, uniform_decode_query_len: int = 1
    ) -> None:
        """Start over with another mode, for an attention backend that can't do what was configured."""
        if uniform_decode_query_len < 1:
            raise ConfigError(
                f"a decode batch has {uniform_decode_query_len} tokens a request",
                where="uniform_decode_query_len",
            )
        self._known: dict[tuple[int, bool, bool, int], tuple[CUDAGraphMode, BatchDescriptor]] = {}
        self.cudagraph_mode = cudagraph_mode
        self.uniform_decode_query_len = uniform_decode_query_len
        self.cudagraph_keys: dict[CUDAGraphMode, set[BatchDescriptor]] = {
            mode: set() for mode in _CAPTURING
        }
        self.bs_to_padded_graph_size = padded_sizes(self.capture_sizes)
        largest_decode = self.max_num_seqs * uniform_decode_query_len
        self._uniform_sizes = tuple(
            size
            for size in self.capture_sizes
            if size <= largest_decode and size % uniform_decode_query_len == 0
        )
        for (has_lora, loras), axes in itertools.product(self.lora.captured(), self._all_axes()):
            if cudagraph_mode.mixed_mode() in _CAPTURING:
                for size in self.capture_sizes:
                    key = BatchDescriptor(size, None, False, has_lora, loras, axes)
                    self.cudagraph_keys[cudagraph_mode.mixed_mode()].add(key)
            if self._separate_decode:
                for size in self._uniform_sizes:
                    key = self._uniform_descriptor(size, has_lora, loras, axes)
                    self.cudagraph_keys[cudagraph_mode.decode_mode()].add(key)

    @property
    def _separate_decode(self) -> bool:
        mode = self.cudagraph_mode
        return mode.separate_routine() and mode.decode_mode() is CUDAGraphMode.FULL

    def _uniform_descriptor(
        self, size: int, has_lora: bool, num_active_loras: int, axes: Axes
    ) -> BatchDescriptor:
        reqs = size // self.uniform_decode_query_len
        return BatchDescriptor(size, reqs, True, has_lora, num_active_loras, axes)

    def _all_axes(self) -> list[Axes]:
        names = sorted(self.axes)
        values = itertools.product(*(self.axes[name] for name in names))
        return [tuple(zip(names, each, strict=True)) for each in values]

    def dispatch(
        self,
        num_tokens: int,
        uniform_decode: bool = False,
        has_lora: bool = False,
        num_active_loras: int = 0,
        *,
        valid_modes: Collection[CUDAGraphMode] | None = None,
        invalid_modes: Collection[CUDAGraphMode] | None = None,
        axes: Mapping[str, Hashable] | None = None,
    ) -> tuple[CUDAGraphMode, BatchDescriptor]:
        """The mode and descriptor that a batch runs as; see ``explain`` for arguments and errors.

        Plain questions are answered from memory, so that a serving step pays for one look-up.
        """
        plain = valid_modes is None and invalid_modes is None and axes is None
        question = (num_tokens, uniform_decode, has_lora, num_active_loras)
        if plain and question in self._known:
            return self._known[question]
        found = self.explain(
            num_tokens,
            uniform_decode,
            has_lora,
            num_active_loras,
            valid_modes=valid_modes,
            invalid_modes=invalid_modes,
            axes=axes,
        )
        answer = (found.mode, found.descriptor)
        if plain:
            self._known[question] = answer
        return answer

    def explain(
        self,
        num_tokens: int,
        uniform_decode: bool = False,
        has_lora: bool = False,
        num_active_loras: int = 0,
        *,
        valid_modes: Collection[CUDAGraphMode] | None = None,
        invalid_modes: Collection[CUDAGraphMode] | None = None,
        axes: Mapping[str, Hashable] | None = None,
        strict: bool | None = None,
    ) -> Dispatch:
        """How a batch runs: FULL on an exact key, else a relaxed key (FULL, then PIECEWISE), else NONE.

        Args:
            num_tokens: tokens of the batch, unpadded.
            uniform_decode: every request has ``uniform_decode_query_len`` tokens.
            has_lora: adapters are active.
            num_active_loras: how many.
            valid_modes: the modes to choose from; None is all.
            invalid_modes: modes to leave out.
            axes: values of the declared extra axes.
            strict: overrides the dispatcher's own.

        Raises:
            InputError: no tokens, an undeclared axis, or NONE is left out and nothing else fits.
            StaticGraphError: ``strict``, and the batch falls back to NONE although its mode promises a graph.
        """
        if num_tokens < 1:
            raise InputError(f"a batch has {num_tokens} tokens", where="dispatch")
        allowed = _allowed(valid_modes, invalid_modes)
        extra = self._extra(axes)
        # What is no whole number of requests can't be a decode batch, whatever the caller says.
        uniform_decode = uniform_decode and num_tokens % self.uniform_decode_query_len == 0
        lora = self.lora.key(has_lora, num_active_loras)
        if lora is None:
            own = BatchDescriptor(num_tokens, None, False, has_lora, num_active_loras, extra)
            return self._uncaptured(own, Reason.NO_LORA, uniform_decode, allowed, strict)
        considered = False
        excluded = False
        for mode, key in self._candidates(num_tokens, uniform_decode, lora, extra):
            considered = True
            if key not in self.cudagraph_keys[mode]:
                continue
            if mode in allowed:
                padding = key.num_tokens - num_tokens
                return Dispatch(mode, key, padding, Reason.PADDED if padding else Reason.EXACT)
            excluded = True
        own = BatchDescriptor(num_tokens, None, False, *lora, extra)
        if excluded or considered:
            reason = Reason.EXCLUDED if excluded else Reason.NOT_CAPTURED
        else:
            reason = Reason.TOO_LARGE if self._promises_graph(uniform_decode) else Reason.MODE
        return self._uncaptured(own, reason, uniform_decode, allowed, strict)

    def _candidates(
        self, num_tokens: int, uniform: bool, lora: tuple[bool, int], extra: Axes
    ) -> Iterator[tuple[CUDAGraphMode, BatchDescriptor]]:
        """The keys that a batch could run as, best first, whether captured or not.

        The larger sizes follow the nearest one, for the case that it was given up.
        """
        if uniform and self._separate_decode:
            for size in _at_least(self._uniform_sizes, num_tokens):
                yield CUDAGraphMode.FULL, self._uniform_descriptor(size, *lora, extra)
        mixed = self.cudagraph_mode.mixed_mode()
        if mixed in _CAPTURING:
            for size in _at_least(self.capture_sizes, num_tokens):
                yield mixed, BatchDescriptor(size, None, False, *lora, extra)

    def _promises_graph(self, uniform: bool) -> bool:
        mode = self.cudagraph_mode
        return (mode.decode_mode() if uniform else mode.mixed_mode()) in _CAPTURING

    def _uncaptured(
        self,
        descriptor: BatchDescriptor,
        reason: Reason,
        uniform: bool,
        allowed: frozenset[CUDAGraphMode],
        strict: bool | None,
    ) -> Dispatch:
        kind = "decode" if uniform else "mixed"
        where = f"{kind} batch, {descriptor.describe()}"
        if CUDAGraphMode.NONE not in allowed:
            raise InputError(
                f"no captured graph fits, and mode NONE is left out: {reason.value}",
                where=where,
                hint="allow NONE, or capture this shape",
            )
        # Decode batches are bounded by max_num_seqs, so one that is too large is a size nobody listed.
        fallback = self._promises_graph(uniform) and (
            reason in _FALLBACKS or (uniform and reason is Reason.TOO_LARGE)
        )
        if fallback and (self.strict if strict is None else strict):
            raise StaticGraphError(
                f"the batch would silently run uncaptured: {reason.value}",
                where=where,
                hint="capture this shape, or dispatch without strict",
            )
        return Dispatch(CUDAGraphMode.NONE, descriptor, 0, reason, fallback)

    def _extra(self, axes: Mapping[str, Hashable] | None) -> Axes:
        given = axes or {}
        unknown = sorted(set(given) - set(self.axes))
        if unknown:
            raise InputError(
                f"no descriptor axis {', '.join(unknown)}",
                where="dispatch",
                hint=f"declared axes: {', '.join(sorted(self.axes)) or 'none'}",
            )
        return tuple((name, given.get(name, self.axes[name][0])) for name in sorted(self.axes))

    def get_capture_descs(self) -> list[tuple[CUDAGraphMode, list[BatchDescriptor]]]:
        """What to capture, PIECEWISE before FULL, largest first (smaller ones reuse the memory)."""
        return [
            (mode, sorted(self.cudagraph_keys[mode], key=_capture_order))
            for mode in _CAPTURING
            if self.cudagraph_keys[mode]
        ]

    def give_up(self, mode: CUDAGraphMode, descriptor: BatchDescriptor) -> None:
        """Never dispatch to this key again: its capture failed, was interrupted or does not fit in memory."""
        self.cudagraph_keys[mode].discard(descriptor)
        self._known.clear()


def _allowed(
    valid: Collection[CUDAGraphMode] | None, invalid: Collection[CUDAGraphMode] | None
) -> frozenset[CUDAGraphMode]:
    every = frozenset((CUDAGraphMode.NONE, *_CAPTURING))
    chosen = every if valid is None else every.intersection(valid)
    return chosen if invalid is None else chosen.difference(invalid)


def _at_least(sizes: Sequence[int], num_tokens: int) -> Sequence[int]:
    return sizes[bisect_left(sizes, num_tokens) :]


def _capture_order(key: BatchDescriptor) -> tuple[object, ...]:
    return (-key.num_tokens, -key.num_active_loras, not key.has_lora, repr(key.extra))
