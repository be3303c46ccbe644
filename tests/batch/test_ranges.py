"""Compile ranges: derivation from endpoints, their errors, and the look-up against a plain scan."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from piecework.errors import ConfigError, InputError
from piecework.runtime.batch.ranges import OPEN_END, Range, RangeTable, derive_ranges


def pairs(ranges):
    return [(each.start, each.end) for each in ranges]


def test_range_is_inclusive_ordered_and_hashable():
    single, wide = Range(4, 4), Range(1, 16)
    assert 1 in wide and 16 in wide and 17 not in wide and 0 not in wide
    assert single.is_single_size() and not wide.is_single_size()
    assert sorted([Range(17, 20), wide]) == [wide, Range(17, 20)]
    assert {Range(4, 4): "x"}[single] == "x"
    assert pickle.loads(pickle.dumps(wide)) == wide
    assert str(wide) == "[1, 16]" and str(Range(17, OPEN_END)) == "[17, …]"


@pytest.mark.parametrize(("start", "end"), [(0, 4), (5, 4), (-1, -1)])
def test_an_empty_range_is_an_error(start, end):
    with pytest.raises(ConfigError, match=f"between {start} and {end}"):
        Range(start, end)


@pytest.mark.parametrize(
    ("endpoints", "largest", "expected"),
    [
        ([], 64, [(1, 64)]),
        ([16, 256], 2048, [(1, 16), (17, 256), (257, 2048)]),
        ([256, 16], 2048, [(1, 16), (17, 256), (257, 2048)]),
        ([16, 64], 64, [(1, 16), (17, 64)]),
        ([1], 1, [(1, 1)]),
        ([1, 2], 3, [(1, 1), (2, 2), (3, 3)]),
    ],
)
def test_ranges_from_endpoints(endpoints, largest, expected):
    assert pairs(derive_ranges(endpoints, largest)) == expected


@pytest.mark.parametrize("endpoints", [[16], [16, 256]])
def test_an_encoder_has_an_open_last_range(endpoints):
    assert pairs(derive_ranges(endpoints, 256, open_ended=True)) == [(1, 16), (17, OPEN_END)]


def test_every_endpoint_beyond_the_largest_batch_is_named():
    with pytest.raises(ConfigError, match="no batch reaches 100, 65; the largest") as caught:
        derive_ranges([4, 100, 65], 64)
    assert caught.value.where == "compile_ranges_endpoints"
    with pytest.raises(ConfigError, match="the largest batch is 0"):
        derive_ranges([], 0)


def single(size: int) -> Range:
    return Range(size, size)


def test_a_single_size_wins_and_entries_are_listed_once():
    table = RangeTable([*derive_ranges([1, 16], 64), *map(single, [8, 1, 8])])
    assert pairs(table.entries) == [(1, 1), (8, 8), (2, 16), (17, 64)]
    assert table.find(8) == Range(8, 8)
    assert table.find(9) == Range(2, 16)
    assert [table.index(size) for size in (1, 8, 2, 16, 17, 64)] == [0, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("size", [0, -1, 65])
def test_a_size_outside_every_range_lists_them(size):
    table = RangeTable([*derive_ranges([16], 64), single(8)])
    with pytest.raises(InputError) as caught:
        table.find(size)
    assert f"batch of {size} " in str(caught.value)
    assert "[8, 8], [1, 16], [17, 64]" in str(caught.value)


def test_overlapping_ranges_are_an_error():
    with pytest.raises(ConfigError, match=r"\[1, 8\] and \[8, 9\] overlap"):
        RangeTable([Range(8, 9), Range(1, 8)])


@settings(deadline=None)
@given(st.data())
def test_lookup_agrees_with_a_scan_and_ranges_cover_every_size(data):
    largest = data.draw(st.integers(1, 300))
    endpoints = data.draw(st.sets(st.integers(1, largest), max_size=8))
    sizes = data.draw(st.sets(st.integers(1, largest), max_size=5))
    ranges = derive_ranges(endpoints, largest)
    table = RangeTable([*ranges, *map(single, sizes)])
    for size in range(1, largest + 1):
        (around,) = [each for each in ranges if size in each]
        assert table.find(size) == (Range(size, size) if size in sizes else around)


@pytest.mark.parametrize(
    ("low", "high", "named"),
    [(9, None, "8, 8"), (0, 16, "17, …"), (17, None, "8, 8], [1, 16"), (0, 7, "8, 8], [17, …")],
)
def test_entries_that_no_batch_reaches_are_named(
    low: int | None, high: int | None, named: str
) -> None:
    table = RangeTable([*derive_ranges([16], None, open_ended=True), single(8)])
    with pytest.raises(ConfigError) as caught:
        table.require_reachable(low, high)
    assert f"none of them is in [{named}]" in str(caught.value)
    assert f"from {low}" in str(caught.value)
