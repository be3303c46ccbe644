"""CompilationCounter.expect checks exact changes and names every wrong one."""

from __future__ import annotations

import pytest

from piecework.errors import ConfigError
from piecework.runtime.counters import CompilationCounter


def test_the_expected_change_passes() -> None:
    counter = CompilationCounter()
    with counter.expect(num_graphs_seen=2, num_inductor_compiles=0):
        counter.num_graphs_seen += 2
    assert counter.snapshot()["num_graphs_seen"] == 2


def test_every_wrong_change_is_listed() -> None:
    counter = CompilationCounter()
    with (
        pytest.raises(AssertionError, match=r"num_graphs_seen: expected \+1, was \+0; num_eager"),
        counter.expect(num_graphs_seen=1, num_eager_compiles=3),
    ):
        pass


def test_an_unknown_counter_is_refused_before_the_block_runs() -> None:
    ran = []
    with (
        pytest.raises(ConfigError, match="num_nothing"),
        CompilationCounter().expect(num_nothing=1),
    ):
        ran.append(1)
    assert not ran


def test_an_exception_inside_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError), CompilationCounter().expect(num_graphs_seen=1):
        1 / 0  # noqa: B018
