"""The examples of a compiler and of a pass do what they say."""

from __future__ import annotations

import pytest

from piecework.examples import own_compiler, own_pass


def test_own_compiler(capsys: pytest.CaptureFixture[str]) -> None:
    pieces = own_compiler.main()
    # three different pieces for two ranges; equal layers share one, so the middle one is called more often;
    # those that serve small batches were also run with none and one row, to see whether one trace serves these too
    small, large = "[1, 16]", "[17, …]"
    counts = [(small, 4), (large, 1), (small, 8), (large, 3), (small, 4), (large, 1)]
    assert [(each.batches, each.count) for each in pieces] == counts
    assert capsys.readouterr().out.count(" calls, ") == 6


@pytest.mark.inductor
def test_own_pass(capsys: pytest.CaptureFixture[str]) -> None:
    own_pass.main()
    assert "pass GatePass: 1 matches in 1 graphs" in capsys.readouterr().out
