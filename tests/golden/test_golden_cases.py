"""Every golden case, four ways: text equal, no undefined name, equal to `fx.Interpreter`, the same under two hash seeds."""

from pathlib import Path

import pytest

from piecework.golden import snapshot
from piecework.golden.cases import Case, discover, unreferenced
from piecework.golden.check import check_case, emit_in_other_process

ROOT = Path(__file__).parent.parent.parent / "golden" / "cases"
CASES = discover(ROOT)


@pytest.fixture(scope="session")
def elsewhere() -> dict[str, dict[str, str]]:
    return emit_in_other_process(ROOT, [case.name for case in CASES])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case: Case, elsewhere: dict[str, dict[str, str]]) -> None:
    results = check_case(case, elsewhere[case.name])
    assert [result.kind for result in results] == list(elsewhere[case.name])
    for result in results:
        assert not result.problems
        assert result.comparison is not None
        if not result.same and not snapshot.in_ci():
            snapshot.propose(result.comparison)
    wrong = [f"{result.name} is {result.status}" for result in results if not result.same]
    assert not wrong, f"{wrong}; see and accept it with: piecework golden review"


def test_no_golden_is_unreferenced(elsewhere: dict[str, dict[str, str]]) -> None:
    assert unreferenced(ROOT, elsewhere) == []


def test_there_are_enough_cases_and_kinds(elsewhere: dict[str, dict[str, str]]) -> None:
    kinds = [kind.partition("_")[0] for texts in elsewhere.values() for kind in texts]
    assert kinds.count("entry") >= 3 and kinds.count("replay") >= 2
    captured = [case for case in CASES if case.name.startswith("captured_")]
    assert len(CASES) - len(captured) >= 12
    assert len(captured) >= 2
