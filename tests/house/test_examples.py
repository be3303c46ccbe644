"""The examples run and do what they say."""

from __future__ import annotations

from pathlib import Path

import pytest

import piecework
from piecework.examples import own_model


def test_own_model_with_a_splitting_op_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    stitched = own_model.main(backend="eager")
    printed = capsys.readouterr().out
    assert "def execution_fn(" in printed and "5 pieces, 3 unique" in printed
    assert stitched.report().splitting == 4


@pytest.mark.parametrize(("example", "lines"), [("own_model", 40), ("engine", 300)])
def test_an_example_is_short(example: str, lines: int) -> None:
    path = Path(piecework.__file__).parent / "examples" / f"{example}.py"
    assert len(path.read_text().splitlines()) < lines
