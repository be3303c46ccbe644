"""Ranges of batch sizes, and which compiled version serves a batch."""

import sys
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

from piecework.errors import ConfigError, InputError

# The end of a range without an upper limit; no tensor has a dimension this large.
OPEN_END = sys.maxsize


@dataclass(frozen=True, slots=True, order=True)
class Range:
    """Batch sizes from ``start`` to ``end``, both included; ordered by start."""

    start: int
    end: int

    def __post_init__(self) -> None:
        if not 1 <= self.start <= self.end:
            why = f"no batch size lies between {self.start} and {self.end}"
            hint = "a range is inclusive and starts at 1 or above"
            raise ConfigError(why, where="Range", hint=hint)

    def __contains__(self, size: int) -> bool:
        return self.start <= size <= self.end

    def is_single_size(self) -> bool:
        return self.start == self.end

    def overlaps(self, low: int | None, high: int | None) -> bool:
        """Whether some batch from ``low`` to ``high`` falls in it; None is no bound."""
        return (high is None or self.start <= high) and (low is None or self.end >= low)

    def __str__(self) -> str:
        return f"[{self.start}, {'…' if self.end == OPEN_END else self.end}]"


def file_name(stem: str, served: Range | None) -> str:
    """A piece, or what belongs to one, and its batch range for file names: ``submod_4_1_16``."""
    if served is None:
        return stem
    return f"{stem}_{served.start}_{'up' if served.end == OPEN_END else served.end}"


def derive_ranges(
    endpoints: Iterable[int], max_size: int | None, *, open_ended: bool = False
) -> tuple[Range, ...]:
    """Cut 1 to ``max_size`` after each endpoint; without it, or ``open_ended``, to no limit."""
    given = list(endpoints)
    if max_size is not None and not open_ended:
        beyond = [end for end in given if end > max_size]
        if beyond or max_size < 1:
            raise ConfigError(
                f"no batch reaches {', '.join(map(str, beyond)) or 1}; the largest batch is {max_size}",
                where="compile_ranges_endpoints",
                hint="give each endpoint once, between 1 and max_num_batched_tokens",
            )
    # With an open end the largest batch is no cut, whether or not it was written as an endpoint.
    cuts = sorted(end for end in given if end != max_size)
    last = OPEN_END if open_ended or max_size is None else max_size
    starts = [1, *(end + 1 for end in cuts)]
    return tuple(Range(start, end) for start, end in zip(starts, [*cuts, last], strict=True))


class RangeTable:
    """``entries``, sizes before ranges, each once; a single size wins over the range around it."""

    __slots__ = ("_exact", "_starts", "entries")

    def __init__(self, entries: Iterable[Range]) -> None:
        ordered = sorted(set(entries))
        exact = [each for each in ordered if each.is_single_size()]
        wide = [each for each in ordered if not each.is_single_size()]
        for left, right in pairwise(wide):
            if right.start <= left.end:
                raise ConfigError(f"the ranges {left} and {right} overlap", where="RangeTable")
        self.entries = (*exact, *wide)
        self._exact = {each.start: at for at, each in enumerate(exact)}
        self._starts = [each.start for each in wide]

    def index(self, size: int) -> int:
        """The position in ``entries`` of what serves ``size``; an `InputError` that lists them."""
        before = bisect_right(self._starts, size)
        at = self._exact.get(size, len(self._exact) + before - 1 if before else None)
        if at is not None and size in self.entries[at]:
            return at
        raise InputError(
            f"a batch of {size} is outside every compiled range: "
            + (", ".join(map(str, self.entries)) or "there is none"),
            hint="raise max_num_batched_tokens, or add the size to compile_sizes",
        )

    def find(self, size: int) -> Range:
        return self.entries[self.index(size)]

    def within(self, low: int | None, high: int | None) -> Self:
        """The entries that serve some batch from ``low`` to ``high``; None is no bound."""
        return RangeTable(each for each in self.entries if each.overlaps(low, high))

    def require_reachable(self, low: int | None, high: int | None) -> None:
        """Refuse entries that serve no batch from ``low`` to ``high``; all of them are named."""
        idle = [each for each in self.entries if not each.overlaps(low, high)]
        if idle:
            allowed = f"from {low or 0}" + ("" if high is None else f" to {high}")
            raise ConfigError(
                f"the trace allows batches {allowed}, and none of them is in {', '.join(map(str, idle))}",
                where="compile_sizes, compile_ranges_endpoints",
                hint="leave these out, or give the batch dimension other bounds when it is marked as dynamic",
            )
