"""Which batch sizes are captured, from limits and wishes as plain integers."""

import math
import operator
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import Any

from piecework.errors import ConfigError, InputError

# Beyond this many tokens a forward is bound by the device, not by launching kernels.
WORTH_CAPTURING = 512
# A batch is told its graph by a table with an entry for every size.
LARGEST = 1 << 24


def default_capture_sizes(
    maximum: int, *, max_num_seqs: int | None = None, decode_query_lens: Iterable[int] = ()
) -> tuple[int, ...]:
    """1, 2, 4, by 8 to 256, by 16 to ``maximum``; the same in requests, for each decode length."""
    sizes = set(_steps(maximum))
    if max_num_seqs is not None:
        sizes |= {n * each for each in decode_query_lens or (1,) for n in _steps(max_num_seqs)}
    return tuple(sorted(size for size in sizes if size <= maximum))


def _steps(maximum: int) -> list[int]:
    if maximum < 1:
        return []
    steps = [1, 2, 4, *range(8, 256, 8), *range(256, maximum + 1, 16)]
    return [*(size for size in steps if size < maximum), maximum]


def resolve_capture_sizes(
    sizes: Sequence[int] | None,
    max_size: int | None,
    *,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    decode_query_lens: Sequence[int] = (1,),
) -> tuple[int, ...]:
    """The sizes to capture, ascending: the user's, or the default steps up to ``max_size``."""
    if sizes is not None:
        if beyond := [size for size in sizes if size > max_num_batched_tokens]:
            raise ConfigError(
                f"no batch reaches {', '.join(map(str, beyond))} tokens; a batch holds at most "
                f"{max_num_batched_tokens}",
                where="cudagraph_capture_sizes",
            )
        return tuple(sizes)
    if max_size is None:  # twice the decode batch, within bounds
        max_size = min(2 * max_num_seqs * max(decode_query_lens), WORTH_CAPTURING)
    return default_capture_sizes(
        min(max_size, max_num_batched_tokens),
        max_num_seqs=max_num_seqs,
        decode_query_lens=decode_query_lens,
    )


def require_positive_sizes(sizes: Iterable[int]) -> tuple[int, ...]:
    """``sizes`` ascending, each once; a `ConfigError` names those that no batch can have."""
    given = [_plain(size) for size in sizes]
    wrong = [n for n in given if type(n) is not int or not 0 < n <= LARGEST]
    if wrong:
        why = f"capture sizes must be positive whole numbers, not {', '.join(map(repr, wrong))}"
        raise ConfigError(why, where="cudagraph_capture_sizes", hint=f"they go up to {LARGEST:,}")
    return tuple(sorted(set(given)))


def decode_sizes(
    sizes: Sequence[int], query_len: int, *, max_num_seqs: int, multiple_of: int = 1
) -> tuple[int, ...]:
    """The sizes of uniform decode batches: whole numbers of requests that cover ``sizes``."""
    rounded = _multiples(sizes, math.lcm(query_len, multiple_of), max(sizes, default=0))
    return tuple(size for size in rounded if 0 < size <= max_num_seqs * query_len)


def _multiples(sizes: Iterable[int], step: int, largest: int) -> tuple[int, ...]:
    """``sizes`` as multiples of ``step``: rounded up, but never beyond ``largest``."""
    return tuple(sorted({min(-(-size // step), largest // step) * step for size in sizes}))


def adjust_sizes_for_spec_decode(
    sizes: Sequence[int], query_len: int, *, max_size: int, tensor_parallel_size: int = 1
) -> tuple[int, ...]:
    """Round sizes up to whole requests (and ranks' shares); beyond ``max_size``, down."""
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
    return _multiples(sizes, step, max_size)


def padded_sizes(sizes: Iterable[int]) -> tuple[int | None, ...]:
    """The padding table: entry ``n`` is the smallest captured size of at least ``n``, or None."""
    ordered = sorted(set(sizes))
    counts = range(max(ordered, default=0) + 1)
    return tuple(ordered[bisect_left(ordered, count)] if ordered else None for count in counts)


def _plain(size: Any) -> Any:
    """A whole number of another library (numpy's, a tensor) as Python's; anything else as it is."""
    try:
        return size if isinstance(size, bool) else operator.index(size)
    except TypeError:
        return size


def require_whole_number(num_tokens: object) -> None:
    """Raise `InputError` if no batch has so many tokens."""
    count = _plain(num_tokens)
    if type(count) is not int or count < 1:
        why = f"a batch has a positive whole number of tokens; got {num_tokens!r}"
        raise InputError(why, where="dispatch", hint="pass the size of the batch, unpadded")


def sizes_to_capture(sizes: object) -> tuple[int, ...] | None:
    """Sizes to capture, ascending; a `ConfigError` where it is no list of them."""
    if sizes is None:
        return None
    if isinstance(sizes, (str, bytes)) or not isinstance(sizes, Iterable):
        why = f"capture takes a list of batch sizes; got {sizes!r}"
        raise ConfigError(why, where="sizes", hint="write capture([1, 2, 4])")
    found = require_positive_sizes(sizes)
    if not found:
        raise ConfigError("there is no batch size to capture", where="sizes")
    return found
