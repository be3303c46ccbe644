"""Random functions under padding: what the analysis calls independent is held against a padded run."""

from __future__ import annotations

import os

import pytest
from padded_runs import disagreement, verdict_of
from random_rows import random_case

NIGHTLY = int(os.environ.get("PIECEWORK_ROWS_CASES", "20000"))


def wrong(seeds: range) -> tuple[list[str], int]:
    """What padding changes although nothing says so; and how many functions were called independent."""
    found, independent = [], 0
    for seed in seeds:
        case, names = random_case(seed)
        verdict = verdict_of(case)
        independent += verdict.reason is None
        try:
            said = disagreement(case, verdict)
        except (RuntimeError, IndexError, ValueError):
            continue  # eager refuses another batch size
        if said is not None:
            found.append(f"seed {seed}: {' → '.join(names)}: {said}")
    return found, independent


def test_a_hundred_random_functions() -> None:
    found, independent = wrong(range(100))
    assert found == []
    assert independent > 10  # it does not refuse everything


@pytest.mark.nightly
@pytest.mark.parametrize("part", range(20))
def test_twenty_thousand_random_functions(part: int) -> None:
    count = NIGHTLY // 20
    found, independent = wrong(range(part * count, (part + 1) * count))
    assert found == []
    assert independent > count // 20
