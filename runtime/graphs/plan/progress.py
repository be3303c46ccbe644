"""How a capture phase looks while it runs: in, outcomes; out, a progress bar on a terminal, plain lines elsewhere.

It never decides anything: the capture loop runs the same without it.
"""

from __future__ import annotations

from rich.console import Console
from rich.progress import TextColumn, TimeRemainingColumn

from piecework.runtime.graphs.plan.phase import CaptureOutcome, format_bytes
from piecework.runtime.observe.progress import StepBar


class CaptureProgress:
    """A bar with the time left and the memory held, or one line per descriptor where there is no terminal.

    Args:
        console: where to draw.
    """

    def __init__(self, console: Console) -> None:
        held = TextColumn("{task.fields[memory]}")
        self._bar = StepBar(console, "capturing", TimeRemainingColumn(), held)

    def started(self, total: int) -> None:
        self._bar.started(total, memory=format_bytes(0))

    def finished(self, outcome: CaptureOutcome, held_bytes: int) -> None:
        what = f"{outcome.mode.name} {outcome.descriptor.describe()}"
        memory = format_bytes(held_bytes)
        self._bar.finished(what, f"{outcome.text}, {memory} held", memory=memory)

    def ended(self) -> None:
        self._bar.ended()
