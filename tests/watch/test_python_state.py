"""Models whose Python state or arguments change between calls: the stitched model gives what the model gives, or refuses, wherever stock ``torch.compile`` does."""

from __future__ import annotations

import warnings
from collections import Counter

import pytest
import torch
from models import EAGER
from python_state_cases import Case, Run, alike, make_case, stock_is_stale

import piecework
from piecework.errors import PieceworkError

SERVED = "served"


def outcomes(number: int) -> list[str]:
    """What became of each call of a case; raises AssertionError for a silent difference."""
    case = make_case(number)
    with Run(case, number) as run:
        if run.result(run.model) is None:
            return ["not a model"]
        try:
            stitched = piecework.compile(
                run.model, (torch.randn(3, 4),), dict(run.space["args"]), config=EAGER
            )
        except PieceworkError:
            return ["refused at capture"]
        found = [compared(run, stitched, case, number, "before any change")]
        assert found == [SERVED], f"refuses an unchanged model: case {number}\n{case}"
        for count, statement in enumerate(case.steps):
            if run.change(statement):
                try:
                    found.append(compared(run, stitched, case, number, statement))
                    compared(run, stitched, case, number, f"{statement} (again)")
                except AssertionError:
                    if not stock_is_stale(case, number, count + 1):
                        raise
                    return [*found, "stale as stock is"]
        return found


def compared(run: Run, stitched, case: Case, number: int, where: str) -> str:
    state = torch.random.get_rng_state()
    before = {k: repr(v) for k, v in run.space["args"].items()}
    try:
        actual = run.call(stitched, run.x)
    except PieceworkError:
        return "refused"
    assert before == {k: repr(v) for k, v in run.space["args"].items()}
    torch.random.set_rng_state(state)
    told = f"case {number}, after: {where}\n{case}"
    try:
        expected = run.call(run.model, run.x)
    except Exception as error:  # noqa: BLE001
        raise AssertionError(f"served what the model raises {error!r} for: {told}") from None
    assert alike(actual, expected), f"differs: {told}"
    return SERVED


def run_cases(numbers: range) -> Counter[str]:
    """Run cases and count outcomes of calls; all failures are reported together."""
    counts: Counter[str] = Counter()
    failures = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in numbers:
            try:
                counts.update(outcomes(number))
            except AssertionError as error:
                failures.append(str(error))
            except Exception as error:  # noqa: BLE001
                failures.append(f"case {number}: {error!r}\n{make_case(number)}")
            if number % 50 == 49:
                torch.compiler.reset()
    assert not failures, f"{len(failures)} cases; the first: {failures[0]}"
    return counts


@pytest.mark.sample(2)
@pytest.mark.parametrize("start", [0, 25])
def test_random_python_state_is_equal_to_eager_or_refused(start: int) -> None:
    counts = run_cases(range(start, start + 25))
    assert counts[SERVED] > 20  # not by refusing everything


def test_what_another_argument_and_a_dict_of_a_class_of_ones_own_share_is_compared_in_both() -> (
    None
):
    run_cases(range(9088, 9089))


@pytest.mark.nightly
@pytest.mark.parametrize("start", range(0, 20_000, 500))
def test_twenty_thousand_random_models_are_equal_to_eager_or_refused(start: int) -> None:
    run_cases(range(start, start + 500))
