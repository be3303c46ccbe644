"""Random functions under padding: whatever is padded gives what the function itself gives."""

from __future__ import annotations

import contextlib
import gc
import os

import pytest
import torch
from models import EAGER
from random_rows import random_function

import piecework
from piecework.closeness import same_values
from piecework.errors import InputError, PieceworkError

NIGHTLY = int(os.environ.get("PIECEWORK_ROWS_CASES", "20000"))


def wrong(seeds: range) -> tuple[list[str], int]:
    """What padding changes; and how many functions were padded."""
    found, padded = [], 0
    for seed in seeds:
        function, arguments, names = random_function(seed)
        fresh = [each.clone() for each in arguments]
        for each in fresh[:2]:
            torch._dynamo.mark_dynamic(each, 0)
        try:
            made = piecework.compile(function, fresh, config=EAGER)
            made.capture([4, 8], progress=False, estimate=False)
        except (PieceworkError, RuntimeError, IndexError, ValueError):
            continue  # not traced, or nothing to capture
        if made.static_graphs.unpadded is not None:
            continue
        padded += 1
        for rows in (3, 6, 7):
            call = [
                *(torch.cat([each, each.flip(0) * 3])[:rows] for each in arguments[:2]),
                *arguments[2:],
            ]
            call[1] = call[1] % 8
            try:
                expected = function(*[each.clone() for each in call])
            except (RuntimeError, IndexError, ValueError):
                continue  # eager refuses another batch size
            with contextlib.suppress(InputError):  # the trace needs other sizes, and says so
                if not same_values(expected, made(*[each.clone() for each in call])):
                    found.append(f"seed {seed}, {rows} rows: {' → '.join(names)}")
    return found, padded


def test_some_random_functions() -> None:
    found, padded = wrong(range(12))
    assert found == []
    assert padded > 1  # it does not refuse everything


@pytest.mark.parametrize("seed", [3194, 9281, 10650])
def test_rows_that_meet_where_most_data_hides_it_are_not_padded(seed: int) -> None:
    assert wrong(range(seed, seed + 1)) == ([], 0)


def test_an_operator_that_lays_out_its_result_by_the_active_mode_is_replayed() -> None:
    assert wrong(range(14307, 14308)) == ([], 1)


@pytest.mark.nightly
@pytest.mark.parametrize("part", range(20))
def test_twenty_thousand_random_functions(part: int) -> None:
    gc.collect()
    gc.freeze()  # each capture collects, and what tests before left takes longer than the capture
    count, found, padded = NIGHTLY // 20, list[str](), 0
    for seed in range(part * count, (part + 1) * count):
        more, made = wrong(range(seed, seed + 1))
        found, padded = found + more, padded + made
        if seed % 25 == 0:
            torch.compiler.reset()
    gc.unfreeze()
    assert found == []
    assert padded > count // 20
