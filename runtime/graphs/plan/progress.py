"""How a capture phase looks while it runs: a bar on a terminal, a line per descriptor elsewhere."""

from __future__ import annotations

from piecework.runtime.graphs.plan.phase import CaptureOutcome, format_bytes, text_of
from piecework.runtime.observe.progress import StepBar
from piecework.scope import own_random_numbers

with own_random_numbers():
    from rich.console import Console
    from rich.progress import TextColumn, TimeRemainingColumn


class CaptureProgress:
    """A bar with the time left and the memory held, or plain lines where there is no terminal."""

    def __init__(self, console: Console) -> None:
        held = TextColumn("{task.fields[memory]}")
        self._bar = StepBar(console, "capturing", TimeRemainingColumn(), held)

    def started(self, total: int) -> None:
        self._bar.started(total, memory=format_bytes(0))

    def finished(self, outcome: CaptureOutcome, held_bytes: int) -> None:
        memory = format_bytes(held_bytes)
        what = text_of((outcome.mode, outcome.descriptor))
        self._bar.finished(what, f"{outcome.text}, {memory} held", memory=memory)

    def ended(self) -> None:
        self._bar.ended()
