"""Progress while pieces compile: a bar on a terminal, plain lines elsewhere, for every model of a block."""

from __future__ import annotations

import io

import torch
from rich.console import Console

import piecework
from piecework.runtime.observe.progress import (
    CompileProgress,
    StepBar,
    current_progress,
    show_progress,
)


def test_plain_lines_where_there_is_no_terminal() -> None:
    text = io.StringIO()
    bar = StepBar(Console(file=text, width=20), "doing")
    bar.started(2)
    bar.finished("one", "one [not markup] and a line that is longer than the console is wide")
    bar.finished("two", "two")
    bar.ended()
    assert text.getvalue().splitlines() == [
        "[1/2] one [not markup] and a line that is longer than the console is wide",
        "[2/2] two",
    ]


def test_a_bar_on_a_terminal_goes_away_at_the_end() -> None:
    text = io.StringIO()
    bar = StepBar(Console(file=text, width=80, force_terminal=True), "doing", auto_refresh=False)
    bar.started(2)
    bar.finished("first", "never shown")
    bar.finished("second", "never shown")
    bar.ended()
    bar.ended()  # as often as one likes
    drawn = text.getvalue()
    assert "doing first" in drawn and "1/2" in drawn and "never shown" not in drawn
    assert drawn.rstrip().endswith("\x1b[2K")  # erased
    bar.started(0)
    bar.ended()


def test_every_model_of_a_block_is_shown_and_none_after_it() -> None:
    text = io.StringIO()
    config = piecework.CompilationConfig(backend="eager")
    with show_progress(CompileProgress(Console(file=text, width=200))):
        piecework.compile(torch.nn.Linear(4, 4), (torch.randn(2, 4),), config=config)
        piecework.compile(torch.nn.Linear(8, 4), (torch.randn(2, 8),), config=config)
    said = [line.partition(":")[0] for line in text.getvalue().splitlines()]
    assert said == ["Linear", "[1/1] submod_0"] * 2
    assert current_progress() is not current_progress()


def test_what_is_short_is_not_shown_and_what_is_long_is_told_from_its_beginning() -> None:
    text = io.StringIO()
    bar = StepBar(Console(file=text), "doing", patience=60.0)
    bar.started(2)
    bar.note("traced")
    bar.finished("one", "one")
    assert text.getvalue() == ""
    bar._shown_from = 0.0  # the minute is over
    bar.finished("two", "two")
    bar.ended()
    assert text.getvalue().splitlines() == ["traced", "[1/2] one", "[2/2] two"]


class Branching(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * 2 if x.shape[0] > 1 else x) + 1


def test_a_trace_that_a_call_waits_for_is_a_warning_and_can_be_made_ahead(caplog) -> None:  # type: ignore[no-untyped-def]
    model, x, one = Branching(), torch.randn(3, 4), torch.randn(1, 4)
    config = piecework.CompilationConfig(backend="eager")
    late = piecework.compile(model, (x,), config=config)
    torch.testing.assert_close(late(one), model(one))
    (warning,) = [each.getMessage() for each in caplog.records if "again" in each.getMessage()]
    assert "x has size 1" in warning and "sizes=[...]" in warning
    caplog.clear()
    ahead = piecework.compile(model, (x,), config=config, sizes=[1, 3])
    assert len(ahead.traces) == 2
    torch.testing.assert_close(ahead(one), model(one))
    assert not [each for each in caplog.records if "again" in each.getMessage()]
