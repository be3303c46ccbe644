"""Every golden case, four ways: text equal, no undefined name, equal to `fx.Interpreter`, the same under two hash seeds."""

from pathlib import Path

import pytest

from piecework.golden import snapshot
from piecework.golden.cases import Case, discover, unreferenced
from piecework.golden.check import check_case
from piecework.golden.seeds import emit_in_other_process

ROOT = Path(__file__).parent.parent.parent / "golden" / "cases"
CASES = discover(ROOT)


@pytest.fixture(scope="session")
def elsewhere() -> dict[str, str]:
    return emit_in_other_process(ROOT, [case.name for case in CASES])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case: Case, elsewhere: dict[str, str]) -> None:
    result = check_case(case, elsewhere[case.name])
    assert not result.problems
    assert result.comparison is not None
    if not result.same and not snapshot.in_ci():
        snapshot.propose(result.comparison)
    assert result.same, f"{result.status}; see and accept it with: piecework golden review"


def test_no_golden_is_unreferenced() -> None:
    assert unreferenced(ROOT) == []


def test_there_are_enough_cases() -> None:
    captured = [case for case in CASES if case.name.startswith("captured_")]
    assert len(CASES) - len(captured) >= 15
    assert len(captured) >= 2
