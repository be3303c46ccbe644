"""Which code may go through a set that it makes."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from piecework.runtime.bind.made_sets import goes_through_sets

THROUGH: list[Callable[..., object]] = [
    lambda xs: [each for each in set(xs)],
    lambda xs: list({*xs}),
    lambda xs: list({each + 1 for each in xs}),
    lambda xs: frozenset(xs).union(xs),
    lambda d, s: list(d.keys() - s),
    lambda d, s: list(s | d.items()),
    lambda xs: sum(set(xs)),
    lambda xs: max(set(xs), key=id),
    lambda xs: (found := set(xs), [each for each in found]),
    lambda xs: tuple({33, 1, 17, 9}),
    lambda xs: [*{33, 1, 17, 9}],
]
NOT_THROUGH: list[Callable[..., object]] = [
    lambda x: x in {1, 2, 3},
    lambda x, xs: x in set(xs),
    lambda xs: len(set(xs)),
    lambda xs: sorted(set(map(abs, xs))),
    lambda xs, ys: [x - y for (_, x), y in zip(xs.items(), ys, strict=True)],
    lambda context: context.set(1),
    lambda x: [x - 1, x & 2],
]


@pytest.mark.parametrize("code", THROUGH)
def test_code_that_goes_through_a_set(code: Callable[..., object]) -> None:
    assert goes_through_sets([code.__code__])


@pytest.mark.parametrize("code", NOT_THROUGH)
def test_code_that_makes_sets_for_other_things(code: Callable[..., object]) -> None:
    assert not goes_through_sets([code.__code__])


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="comprehensions are part of the code then")
def test_a_sorted_comprehension() -> None:
    assert not goes_through_sets([(lambda xs: sorted({each.name for each in xs})).__code__])


def only_asks(xs: list[object], name: str) -> bool:
    names = set(map(str, xs))
    return name in names and "other" not in names


def test_a_set_that_has_a_name_is_followed() -> None:
    assert not goes_through_sets([only_asks.__code__])


def tells(xs: list[object]) -> None:
    if not xs:
        raise ValueError(f"none of {set(xs)}")


def test_what_an_error_says_is_no_result() -> None:
    assert not goes_through_sets([tells.__code__])
