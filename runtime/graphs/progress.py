"""How a capture phase looks while it runs: in, outcomes; out, a progress bar on a terminal, plain lines elsewhere.

It never decides anything: the capture loop runs the same without it.
"""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.progress import TimeRemainingColumn as Remaining

from piecework.runtime.graphs.capture import CaptureOutcome, format_bytes


class CaptureProgress:
    """A bar with the time left and the memory held, or one line per descriptor where there is no terminal.

    Args:
        console: where to draw.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._total = 0
        self._done = 0

    def started(self, total: int) -> None:
        self._total, self._done = total, 0
        if not self._console.is_terminal:
            return
        self._bar = Progress(
            TextColumn("capturing {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            Remaining(),
            TextColumn("{task.fields[memory]}"),
            console=self._console,
            transient=True,
        )
        self._bar.start()
        self._task = self._bar.add_task("", total=total, memory=format_bytes(0))

    def finished(self, outcome: CaptureOutcome, held_bytes: int) -> None:
        self._done += 1
        what = f"{outcome.mode.name} {outcome.descriptor.describe()}"
        if self._bar is not None and self._task is not None:
            memory = format_bytes(held_bytes)
            self._bar.update(self._task, advance=1, description=what, memory=memory)
        else:
            result = "captured" if outcome.captured else f"not captured: {outcome.error}"
            self._console.print(
                f"[{self._done}/{self._total}] {what}: {result}, {outcome.seconds:.2f} s, "
                f"{format_bytes(held_bytes)} held",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )

    def ended(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar, self._task = None, None
