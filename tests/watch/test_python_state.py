"""Models whose Python state or arguments change between calls: the stitched model gives what the model gives, or refuses, wherever stock ``torch.compile`` does."""

from __future__ import annotations

import sys
import types
import warnings
from collections import Counter

import pytest
import torch
from models import EAGER
from python_state_cases import Case, make_case

import piecework
from piecework.errors import PieceworkError

SERVED = "served"


class Run:
    """One case: the model, the stitched model, and the arguments of the next call."""

    def __init__(self, case: Case, number: int) -> None:
        self.case = case
        self.module = types.ModuleType(f"python_state_case_{number}")
        # Dynamo finds a module's globals by its name.
        sys.modules[self.module.__name__] = self.module
        exec(compile(case.source, f"<{self.module.__name__}>", "exec"), self.module.__dict__)
        torch.manual_seed(0)
        self.model = self.module.Model().eval()
        self.space = self.module.__dict__
        self.space["m"] = self.model
        self.space["args"] = {k: eval(v, self.space) for k, v in case.arguments.items()}
        self.x = torch.randn(5, 4)

    def close(self) -> None:
        sys.modules.pop(self.module.__name__, None)
        torch.set_default_dtype(torch.float32)

    def call(self, model, x):
        with torch.no_grad():
            return model(x, **self.space["args"])

    def change(self, statement: str) -> bool:
        """Run a statement; False if it can't be done to what the case holds."""
        try:
            exec(statement, self.space)
        except Exception:  # noqa: BLE001
            return False
        return True


def outcomes(number: int) -> list[str]:
    """What became of each call of a case; raises AssertionError for a silent difference."""
    case = make_case(number)
    run = Run(case, number)
    try:
        try:
            run.call(run.model, run.x)
        except Exception:  # noqa: BLE001
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
                    if not stock_is_stale(case, number, count):
                        raise
                    return [*found, "stale as stock is"]
        return found
    finally:
        run.close()


def stock_is_stale(case: Case, number: int, last: int) -> bool:
    """Whether stock ``torch.compile`` gives another result than eager after the first steps of a case, too."""
    run = Run(case, number)
    try:
        torch.compiler.reset()
        stock = torch.compile(run.model, backend="eager", dynamic=True)
        run.call(stock, torch.randn(3, 4))
        for statement in case.steps[: last + 1]:
            if run.change(statement):
                for _ in range(2):
                    state = torch.random.get_rng_state()
                    try:
                        actual = run.call(stock, run.x)
                    except Exception:  # noqa: BLE001
                        actual = None
                    torch.random.set_rng_state(state)
                    try:
                        expected = run.call(run.model, run.x)
                    except Exception:  # noqa: BLE001
                        if actual is not None:
                            return True
                        continue
                    if actual is None or not _alike(actual, expected):
                        return True
        return False
    finally:
        run.close()


def _alike(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    same = torch.allclose(actual, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
    return actual.dtype == expected.dtype and same


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
    assert _alike(actual, expected), f"differs: {told}"
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


@pytest.mark.nightly
@pytest.mark.parametrize("start", range(0, 20_000, 500))
def test_twenty_thousand_random_models_are_equal_to_eager_or_refused(start: int) -> None:
    run_cases(range(start, start + 500))
