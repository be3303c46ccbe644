"""Tells which captured graph runs a batch, if any, and why."""

import enum
import itertools
import math
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from piecework.errors import ConfigError, InputError, StaticGraphError
from piecework.runtime.batch.descriptor import PLAIN, Axes, BatchDescriptor, BatchKind, Key
from piecework.runtime.batch.mode import CUDAGraphMode
from piecework.runtime.batch.sizes import (
    decode_sizes,
    padded_sizes,
    require_positive_sizes,
    require_whole_number,
)

_CAPTURING = (CUDAGraphMode.PIECEWISE, CUDAGraphMode.FULL)
#: Axes whose captured values are the most that a batch may have.
BOUNDS = frozenset({"max_query_len"})


class Reason(enum.Enum):
    """Why a batch runs as it does."""

    EXACT = "its size is captured"
    PADDED = "padded to the next captured size"
    MODE = "the mode captures nothing for this kind of batch"
    EXCLUDED = "the caller excluded the modes it is captured in"
    TOO_LARGE = "larger than every captured size"
    NO_LORA = "no graph is captured for this many adapters"
    NOT_CAPTURED = "its graph was not captured, or was given up"
    NOT_EXACT = "rows are not known to stay apart, so nothing is padded"
    UNPADDED = "pad=False, so nothing is padded"
    AXIS = "nothing is captured for this value of an axis"
    FACTOR = "the next captured size is more than max_padding_factor times as large"


# What nobody chose: the batch could have run captured.
_FALLBACKS = (Reason.NO_LORA, Reason.NOT_CAPTURED, Reason.NOT_EXACT, Reason.AXIS)


@dataclass(frozen=True, slots=True)
class Dispatch:
    """How one batch runs; ``is_fallback``: uncaptured although its mode promises a graph."""

    mode: CUDAGraphMode
    descriptor: BatchDescriptor
    padding: int
    reason: Reason
    is_fallback: bool = False


Adapters = tuple[bool, int]
"""Whether adapters are active, and how many; of a graph, how many at most, and 0 is any number."""


def lora_cases(
    enabled: bool = False, specialize: bool = True, counts: tuple[int, ...] = ()
) -> tuple[Adapters, ...]:
    """What gets graphs of its own: no adapters (``specialize``), and each of ``counts``, or any."""
    if list(counts) != sorted(set(counts)) or any(n < 1 for n in counts):
        why = f"numbers of active adapters must ascend from 1, not {list(counts)}"
        raise ConfigError(why, where="lora_counts")
    active = tuple((True, count) for count in counts or (0,)) if enabled else ()
    return active if enabled and not specialize else ((False, 0), *active)


def _covers(case: Adapters, has_lora: bool, num_active_loras: int) -> bool:
    with_lora, most = case
    return (not most or num_active_loras <= most) if with_lora else not has_lora


class CudagraphDispatcher:
    """The captured shapes of one model, and which of them a batch runs as.

    Args:
        mode: what decode and mixed batches use.
        capture_sizes: sizes in tokens.
        max_num_seqs: most requests in a batch; decode graphs never exceed it.
        uniform_decode_query_len: tokens of each request in a decode batch; several where drafts
            differ in width, and the widest is meant where a batch does not say which.
        decode_multiple_of: ranks that the tokens of a decode batch are cut over.
        lora: what is captured for adapters, as `lora_cases` tells.
        axes: further axes of the descriptor, each with the values to capture; the first is the
            default. A batch runs in a graph of its own value; in ``max_query_len``, in one of the
            next larger value, and of the largest where it doesn't say.
        strict: a fall-back to NONE that nobody chose is an error.
        exact: why nothing is padded, if so: a batch then runs captured only in its own size.
        max_padding_factor: a batch runs in no graph of more than so many times its tokens.

    Attributes:
        cudagraph_keys: what is captured, by mode.
        decode_sizes: query length of a decode batch → the sizes captured for it.

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
        uniform_decode_query_len: int | Sequence[int] = 1,
        decode_multiple_of: int = 1,
        lora: Sequence[Adapters] = lora_cases(),
        axes: Mapping[str, Sequence[Hashable]] | None = None,
        strict: bool = False,
        exact: Reason | None = None,
        max_padding_factor: float | None = None,
    ) -> None:
        self.capture_sizes = require_positive_sizes(capture_sizes)
        self.bs_to_padded_graph_size = padded_sizes(self.capture_sizes)
        self.axes = {name: tuple(each) for name, each in sorted((axes or {}).items())}
        self.lora, self.max_num_seqs = lora, max_num_seqs
        if max_num_seqs < 1:
            raise ConfigError(f"a batch of {max_num_seqs} requests", where="max_num_seqs")
        if not all(self.axes.values()):
            raise ConfigError("every axis needs at least one value", where="axes")
        self.strict, self.exact = strict, exact
        self.max_padding_factor = math.inf if max_padding_factor is None else max_padding_factor
        self._decode_multiple_of = decode_multiple_of
        self.initialize_cudagraph_keys(mode, uniform_decode_query_len)

    def initialize_cudagraph_keys(
        self, cudagraph_mode: CUDAGraphMode, uniform_decode_query_len: int | Sequence[int] = 1
    ) -> None:
        """Start over with another mode, where attention can't do what was configured."""
        lens = uniform_decode_query_len
        lens = [lens] if isinstance(lens, int) else list(lens)
        if not lens or min(lens) < 1:
            why = f"a decode batch has {', '.join(map(str, lens)) or 'no'} tokens a request"
            raise ConfigError(why, where="uniform_decode_query_len")
        self.cudagraph_mode = cudagraph_mode
        self.uniform_decode_query_len = max(lens)
        limits = {"max_num_seqs": self.max_num_seqs, "multiple_of": self._decode_multiple_of}
        self.decode_sizes = {
            query_len: decode_sizes(self.capture_sizes, query_len, **limits)
            for query_len in sorted(set(lens))
        }
        self.cudagraph_keys: dict[CUDAGraphMode, set[BatchDescriptor]] = {
            each: set() for each in _CAPTURING
        }
        for lora, axes in itertools.product(self.lora, self.every_axes()):
            for query_len in (0, *self.decode_sizes):
                for mode, key in self._keys(query_len, lora, axes):
                    self.cudagraph_keys[mode].add(key)
        self._known: dict[tuple[int | bool, ...], Key] = {}

    def every_axes(self) -> list[Axes]:
        """Every combination of values of the axes."""
        values = itertools.product(*self.axes.values())
        return [tuple(zip(self.axes, each, strict=True)) for each in values]

    def _keys(
        self, query_len: int, lora: Adapters, axes: Axes, fits: int | None = None
    ) -> Iterator[Key]:
        """The keys of one case, best first, or those that a batch of ``fits`` tokens may run in."""
        mode, full = self.cudagraph_mode, CUDAGraphMode.FULL
        if query_len and mode.separate_routine() and mode.decode_mode() is full:
            for size in self._fitting(self.decode_sizes.get(query_len, ()), fits):
                yield full, BatchDescriptor(size, size // query_len, True, *lora, axes)
        mixed = mode.mixed_mode()
        if mixed in _CAPTURING:
            for size in self._fitting(self.capture_sizes, fits):
                reqs = min(size, self.max_num_seqs) if mixed is full else None
                yield mixed, BatchDescriptor(size, reqs, False, *lora, axes)

    def _fitting(self, sizes: Sequence[int], fits: int | None) -> list[int]:
        if fits is None:
            return list(sizes)
        largest = fits if self.exact is not None else fits * self.max_padding_factor
        return [size for size in sizes if fits <= size <= largest]

    def get_capture_descs(self) -> list[tuple[CUDAGraphMode, list[BatchDescriptor]]]:
        """What to capture, PIECEWISE before FULL, largest first, to reuse memory."""

        def order(key: BatchDescriptor) -> tuple[object, ...]:
            sizes = (-key.num_tokens, -(key.num_reqs or 0), -key.num_active_loras)
            return (sizes, not key.has_lora, repr(key.extra))

        return [
            (mode, sorted(keys, key=order)) for mode, keys in self.cudagraph_keys.items() if keys
        ]

    def give_up(self, mode: CUDAGraphMode, descriptor: BatchDescriptor) -> None:
        """Never dispatch to this key again."""
        self.cudagraph_keys[mode].discard(descriptor)
        self._known.clear()

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
        query_len: int | None = None,
    ) -> Key:
        """The mode and descriptor of a batch, as `explain` tells; plain ones cost one look-up."""
        plain = valid_modes is invalid_modes is axes is query_len is None
        question = (num_tokens, uniform_decode, has_lora, num_active_loras)
        if plain and question in self._known:
            return self._known[question]
        left_out = set(() if valid_modes is None else CUDAGraphMode).difference(valid_modes or ())
        invalid = frozenset(left_out.union(invalid_modes or ()))
        extra = tuple((axes or {}).items())
        found = self.explain(num_tokens, BatchKind(*question[1:], extra, invalid, query_len))
        answer = (found.mode, found.descriptor)
        if plain:
            self._known[question] = answer
        return answer

    def explain(
        self, num_tokens: int, kind: BatchKind = PLAIN, *, strict: bool | None = None
    ) -> Dispatch:
        """How a batch runs: FULL on an exact key, else a relaxed one (FULL, PIECEWISE), else NONE.

        Args:
            num_tokens: tokens of the batch, unpadded.
            kind: what else is known of it.
            strict: overrides the dispatcher's own.

        Raises:
            InputError: no tokens, an undeclared axis, or NONE is left out and nothing else fits.
            StaticGraphError: ``strict``, and its mode promises a graph that there is not.
        """
        require_whole_number(num_tokens)
        extra = self._extra(dict(kind.axes))
        query_len = kind.query_len or self.uniform_decode_query_len
        # What is no whole number of requests can't be a decode batch, whatever the caller says.
        uniform = kind.uniform_decode and num_tokens % query_len == 0
        adapters = (kind.has_lora, kind.num_active_loras)
        lora = next((case for case in self.lora if _covers(case, *adapters)), None)
        # Larger sizes follow the nearest one, for the case that it was given up.
        fitting = lora and list(self._keys(query_len * uniform, lora, extra, num_tokens))
        captured = [(m, key) for m, key in fitting or () if key in self.cudagraph_keys[m]]
        for mode, key in captured:
            if mode not in kind.invalid_modes:
                padding = key.num_tokens - num_tokens
                return Dispatch(mode, key, padding, Reason.PADDED if padding else Reason.EXACT)
        mode = self.cudagraph_mode
        promised = (mode.decode_mode() if uniform else mode.mixed_mode()) in _CAPTURING
        if lora is None:
            reason = Reason.NO_LORA
        elif captured:
            reason = Reason.EXCLUDED
        elif fitting:
            known = all(value in self.axes[name] for name, value in extra)
            reason = Reason.NOT_CAPTURED if known else Reason.AXIS
        elif not promised:
            reason = Reason.MODE
        elif num_tokens > max(self.capture_sizes, default=0):
            reason = Reason.TOO_LARGE
        else:
            reason = self.exact or Reason.FACTOR
        own = BatchDescriptor(num_tokens, None, False, *(lora or adapters), extra)
        where = f"{'decode' if uniform else 'mixed'} batch, {own.describe()}"
        if CUDAGraphMode.NONE in kind.invalid_modes:
            why = f"no captured graph fits, and mode NONE is left out: {reason.value}"
            raise InputError(why, where=where, hint="allow NONE, or capture this shape")
        # Decode batches are bounded by max_num_seqs: one that is too large is a size nobody listed.
        fallback = promised and (reason in _FALLBACKS or (uniform and reason is Reason.TOO_LARGE))
        if fallback and (self.strict if strict is None else strict):
            why = f"the batch would silently run uncaptured: {reason.value}"
            hint = "capture this shape, or dispatch without strict"
            raise StaticGraphError(why, where=where, hint=hint)
        return Dispatch(CUDAGraphMode.NONE, own, 0, reason, fallback)

    def _extra(self, given: Mapping[str, Hashable]) -> Axes:
        """The value of each axis in the descriptor of a batch; its own where nothing fits."""
        unknown = sorted(set(given) - set(self.axes))
        if unknown:
            why = f"no descriptor axis {', '.join(unknown)}"
            hint = f"declared axes: {', '.join(self.axes) or 'none'}"
            raise InputError(why, where="dispatch", hint=hint)
        found: list[tuple[str, Hashable]] = []
        for name, captured in self.axes.items():
            value = given.get(name, max(captured) if name in BOUNDS else captured[0])  # type: ignore[type-var]
            if name in BOUNDS:
                value = min((n for n in captured if n >= value), default=value)  # type: ignore[operator, type-var]
            found.append((name, value))
        return tuple(found)
