"""Which batch sizes are captured: in, limits and wishes as plain integers; out, a sorted tuple of sizes or a padding table.

It never reads a configuration object and never changes what it is given, so that the configuration can call it.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence

from piecework.errors import ConfigError

# Beyond this many tokens a forward is bound by the device, not by launching kernels.
_WORTH_CAPTURING = 512


def default_max_capture_size(
    max_num_seqs: int, max_num_batched_tokens: int, decode_query_len: int = 1
) -> int:
    """The largest size captured when nobody names one: ``min(2 * max_num_seqs * query_len, 512, max tokens)``.

    Twice the decode batch leaves room for small mixed batches.
    """
    return min(2 * max_num_seqs * decode_query_len, _WORTH_CAPTURING, max_num_batched_tokens)


def default_capture_sizes(maximum: int) -> tuple[int, ...]:
    """1, 2, 4, then by 8 to 256, then by 16 up to ``maximum``, and ``maximum`` itself.

    Example:
        >>> default_capture_sizes(20)
        (1, 2, 4, 8, 16, 20)
    """
    if maximum < 1:
        return ()
    steps = [1, 2, 4, *range(8, 256, 8), *range(256, maximum + 1, 16)]
    return tuple(sorted({size for size in steps if size <= maximum} | {maximum}))


def resolve_capture_sizes(
    sizes: Iterable[int] | None,
    max_size: int | None,
    *,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    decode_query_len: int = 1,
) -> tuple[int, ...]:
    """The sizes to capture, ascending, from what the user gave and what the engine can reach.

    Args:
        sizes: the user's list, or None for the default steps; an empty list captures nothing.
        max_size: the user's ``max_cudagraph_capture_size``, or None. Alone it truncates the default steps.
        max_num_seqs: most requests in a batch.
        max_num_batched_tokens: most tokens in a batch.
        decode_query_len: query tokens of one request in a decode batch.

    Raises:
        ConfigError: a size is not a positive integer or can't be reached, or the list and the maximum disagree.

    Example:
        >>> resolve_capture_sizes([8, 1, 8], None, max_num_seqs=8, max_num_batched_tokens=64)
        (1, 8)
    """
    if max_size is not None and (not _is_integer(max_size) or max_size < 0):
        raise ConfigError(
            f"the largest capture size is {max_size!r}, not a whole number of tokens",
            where="max_cudagraph_capture_size",
            hint="give a number of tokens, or 0 to capture nothing",
        )
    if sizes is None:
        if max_size is None:
            max_size = default_max_capture_size(
                max_num_seqs, max_num_batched_tokens, decode_query_len
            )
        return default_capture_sizes(min(max_size, max_num_batched_tokens))
    chosen = _check_sizes(sizes, max_num_batched_tokens)
    largest = chosen[-1] if chosen else 0
    if max_size is not None and max_size != largest:
        raise ConfigError(
            f"max_cudagraph_capture_size is {max_size}, but the largest of cudagraph_capture_sizes is {largest}",
            where="cudagraph_capture_sizes",
            hint="give only one of the two",
        )
    return chosen


def adjust_sizes_for_spec_decode(
    sizes: Sequence[int], query_len: int, *, max_size: int, tensor_parallel_size: int = 1
) -> tuple[int, ...]:
    """Round sizes up to what a speculative decode batch can be, without exceeding ``max_size``.

    A uniform batch holds ``query_len`` tokens per request (one plus the speculated ones), so only multiples
    of it are ever run. Where the sequence dimension is cut across ranks the multiple must suit both.

    Args:
        sizes: the sizes so far.
        query_len: tokens per request.
        max_size: no rounded size may exceed it.
        tensor_parallel_size: ranks that the tokens are cut over (1 if they are not).

    Raises:
        ConfigError: ``query_len`` is not positive, or not even one multiple fits.

    Example:
        >>> adjust_sizes_for_spec_decode((1, 2, 4, 8), 3, max_size=8)
        (3, 6)
    """
    if query_len < 1 or tensor_parallel_size < 1:
        raise ConfigError(
            f"query length {query_len} and tensor parallel size {tensor_parallel_size} must be positive",
            where="adjust_cudagraph_sizes_for_spec_decode",
        )
    step = math.lcm(query_len, tensor_parallel_size)
    if not sizes or step == 1:
        return tuple(sorted({size for size in sizes if size <= max_size}))
    if step > max_size:
        raise ConfigError(
            f"no capture size is a multiple of {step} (query length {query_len}, tensor parallel "
            f"{tensor_parallel_size}) and at most {max_size}",
            where="cudagraph_capture_sizes",
            hint=f"raise max_cudagraph_capture_size to {step} or more, or speculate fewer tokens",
        )
    rounded = {-(-size // step) * step for size in sizes}
    fitting = {size for size in rounded if size <= max_size}
    return tuple(sorted(fitting or {step}))


def padded_sizes(sizes: Iterable[int], maximum: int | None = None) -> tuple[int | None, ...]:
    """The padding table: entry ``n`` is the smallest captured size of at least ``n``, or None.

    Args:
        sizes: captured sizes in any order.
        maximum: last index of the table; the largest captured size by default.

    Example:
        >>> padded_sizes([1, 4], 5)
        (1, 1, 4, 4, 4, None)
    """
    ordered = sorted(set(sizes))
    if maximum is None:
        maximum = ordered[-1] if ordered else 0
    positions = (bisect_left(ordered, count) for count in range(maximum + 1))
    return tuple(ordered[at] if at < len(ordered) else None for at in positions)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_sizes(sizes: Iterable[int], max_num_batched_tokens: int) -> tuple[int, ...]:
    given = list(sizes)
    wrong = [size for size in given if not _is_integer(size) or size < 1]
    if wrong:
        raise ConfigError(
            f"capture sizes must be positive whole numbers, not {', '.join(map(repr, wrong))}",
            where="cudagraph_capture_sizes",
        )
    unreachable = sorted({size for size in given if size > max_num_batched_tokens})
    if unreachable:
        raise ConfigError(
            f"no batch reaches {', '.join(map(str, unreachable))} tokens; a batch holds at most "
            f"{max_num_batched_tokens}",
            where="cudagraph_capture_sizes",
            hint="remove these sizes, or raise max_num_batched_tokens",
        )
    return tuple(sorted(set(given)))
