"""Capture sizes: defaults, users' lists, speculative decoding, the padding table."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from piecework.errors import ConfigError
from piecework.runtime.batch.sizes import (
    adjust_sizes_for_spec_decode,
    default_capture_sizes,
    default_max_capture_size,
    padded_sizes,
    resolve_capture_sizes,
)

LIMITS = {"max_num_seqs": 256, "max_num_batched_tokens": 8192}


@pytest.mark.parametrize(
    ("seqs", "tokens", "query", "expected"),
    [(256, 8192, 1, 512), (8, 8192, 1, 16), (8, 8192, 3, 48), (256, 300, 1, 300), (1, 1, 1, 1)],
)
def test_default_maximum(seqs, tokens, query, expected):
    assert default_max_capture_size(seqs, tokens, query) == expected


@pytest.mark.parametrize(
    ("maximum", "expected"),
    [
        (0, ()),
        (1, (1,)),
        (3, (1, 2, 3)),
        (4, (1, 2, 4)),
        (20, (1, 2, 4, 8, 16, 20)),
        (24, (1, 2, 4, 8, 16, 24)),
    ],
)
def test_default_sizes(maximum, expected):
    assert default_capture_sizes(maximum) == expected


def test_default_sizes_of_512():
    sizes = default_capture_sizes(512)
    assert sizes[:5] == (1, 2, 4, 8, 16)
    assert sizes[-3:] == (480, 496, 512)
    assert {b - a for a, b in itertools.pairwise(sizes) if 8 <= a < 256} == {8}
    assert {b - a for a, b in itertools.pairwise(sizes) if a >= 256} == {16}
    assert len(sizes) == 51


@pytest.mark.parametrize(
    ("sizes", "maximum", "expected"),
    [
        ([8, 1, 8, 2], None, (1, 2, 8)),
        ([8, 1], 8, (1, 8)),
        ([], None, ()),
        ([], 0, ()),
        (None, 6, (1, 2, 4, 6)),
        (None, 0, ()),
    ],
)
def test_users_choice(sizes, maximum, expected):
    assert resolve_capture_sizes(sizes, maximum, **LIMITS) == expected


def test_the_maximum_alone_is_cut_to_what_a_batch_can_hold():
    limits = {"max_num_seqs": 256, "max_num_batched_tokens": 20}
    assert resolve_capture_sizes(None, 512, **limits) == (1, 2, 4, 8, 16, 20)


def test_nothing_given():
    limits = {"max_num_seqs": 4, "max_num_batched_tokens": 64}
    assert resolve_capture_sizes(None, None, **limits) == (1, 2, 4, 8)
    found = resolve_capture_sizes(None, None, **limits, decode_query_lens=[3])
    assert found == (1, 2, 3, 4, 6, 8, 12, 16, 24)


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


def test_all_faults_of_a_list_are_told_at_once():
    with pytest.raises(
        ConfigError, match=r"not 0, 'a'; no batch reaches 9000.*the largest .* 9000"
    ):
        resolve_capture_sizes([0, "a", 9000], 5, **LIMITS)


@pytest.mark.parametrize(
    ("sizes", "maximum", "message"),
    [
        ([1, 8], 16, "max_cudagraph_capture_size is 16, but the largest .* is 8"),
        ([1, 8], 4, "is 4, but the largest"),
        ([], 4, "is 4, but the largest .* is 0"),
        ([0, 1], None, "positive whole numbers, not 0"),
        ([1, -3, 2.0, True], None, "not -3, 2.0, True"),
        ([1, 9000, 10000], None, "no batch reaches 9000, 10000 tokens; a batch holds at most 8192"),
        (None, -1, "largest capture size is -1"),
        (None, 2.5, "largest capture size is 2.5"),
    ],
)
def test_wrong_choices(sizes, maximum, message):
    with pytest.raises(ConfigError, match=message):
        resolve_capture_sizes(sizes, maximum, **LIMITS)


def test_the_users_list_is_not_changed():
    sizes = [8, 1, 8]
    resolve_capture_sizes(sizes, None, **LIMITS)
    assert sizes == [8, 1, 8]


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
@given(st.sets(st.integers(1, 60), max_size=12), st.integers(0, 80))
def test_padding_table(sizes, maximum):
    table = padded_sizes(sizes, maximum)
    assert len(table) == maximum + 1
    for count, padded in enumerate(table):
        assert padded == min((s for s in sizes if s >= count), default=None)
