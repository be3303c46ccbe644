"""Capture sizes: defaults, users' lists, speculative decoding, the padding table."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from piecework import CompilationConfig
from piecework.errors import ConfigError
from piecework.runtime.batch.sizes import (
    adjust_sizes_for_spec_decode,
    padded_sizes,
    resolve_capture_sizes,
)


@pytest.mark.parametrize("seqs", [1, 3, 100, 101, 250, 511, 700])
@pytest.mark.parametrize("lens", [(1,), (2,), (3, 17)])
def test_the_largest_decode_batch_is_met_exactly_if_it_is_worth_it(seqs, lens):
    found = resolve_capture_sizes(
        None, None, max_num_seqs=seqs, max_num_batched_tokens=32768, decode_query_lens=lens
    )
    maximum = min(2 * seqs * max(lens), 512)
    assert found[-1] == maximum
    for query_len in lens:
        assert (seqs * query_len in found) == (seqs * query_len <= maximum)
    assert len(found) <= 51 + 35 * len(lens)


@pytest.mark.parametrize("mode", ["NONE", "FULL"])
def test_a_size_beyond_any_batch_is_refused_before_a_table_is_made_of_it(mode):
    with pytest.raises(ConfigError, match="less than or equal to 16777216"):
        CompilationConfig(cudagraph_mode=mode, cudagraph_capture_sizes=[10**12])


@pytest.mark.parametrize(
    ("sizes", "query", "maximum", "parallel", "expected"),
    [
        ((1, 2, 4, 8), 3, 8, 1, (3, 6)),
        ((1, 2, 4, 8), 3, 9, 1, (3, 6, 9)),
        ((1, 2, 4, 8), 1, 8, 1, (1, 2, 4, 8)),
        ((4, 8, 16), 2, 16, 4, (4, 8, 16)),
        ((4, 8, 16), 3, 16, 2, (6, 12)),
        ((8,), 5, 8, 1, (5,)),
        ((), 5, 0, 1, ()),
    ],
)
def test_spec_decode(sizes, query, maximum, parallel, expected):
    found = adjust_sizes_for_spec_decode(
        sizes, query, max_size=maximum, tensor_parallel_size=parallel
    )
    assert found == expected


def test_spec_decode_that_can_not_fit():
    with pytest.raises(ConfigError, match=r"no capture size is a multiple of 6 .* at most 5"):
        adjust_sizes_for_spec_decode((1, 5), 3, max_size=5, tensor_parallel_size=2)
    with pytest.raises(ConfigError, match="must be positive"):
        adjust_sizes_for_spec_decode((1,), 0, max_size=5)


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 600), max_size=20),
    st.integers(1, 9),
    st.integers(1, 4),
    st.integers(40, 600),
)
def test_spec_decode_sizes_are_reachable_multiples(sizes, query, parallel, maximum):
    found = adjust_sizes_for_spec_decode(
        sizes, query, max_size=maximum, tensor_parallel_size=parallel
    )
    assert list(found) == sorted(set(found))
    assert all(n <= maximum and n % query == 0 and n % parallel == 0 for n in found)
    for size in sizes:
        fits = [n for n in range(size, maximum + 1) if n % query == 0 and n % parallel == 0]
        if fits:
            assert fits[0] in found


@settings(deadline=None)
@given(st.sets(st.integers(1, 60), max_size=12))
def test_padding_table(sizes):
    table = padded_sizes(sizes)
    assert len(table) == max(sizes, default=0) + 1
    for count, padded in enumerate(table):
        assert padded == min((s for s in sizes if s >= count), default=None)
