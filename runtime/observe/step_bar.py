"""Steps that take long, shown while they run. In: how many there are, and each one as it ends. Out: a bar on a terminal, a line per step elsewhere.

It decides nothing and never fails a step: whatever is shown runs the same without it.
"""

from __future__ import annotations

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
)


class StepBar:
    """A bar that moves with each step, or plain lines where the console is no terminal.

    Args:
        console: where to draw.
        verb: what is done, such as "compiling".
        columns: what stands behind the bar; they may show fields given to `started` and `finished`.
        auto_refresh: redraw from a thread of its own, so that times go on during a step.

    Example:
        >>> bar = StepBar(Console(stderr=True), "compiling")
        >>> bar.started(2)
        >>> bar.finished("submod_0", "submod_0: 1.2 s")
    """

    def __init__(
        self, console: Console, verb: str, *columns: ProgressColumn, auto_refresh: bool = True
    ) -> None:
        self._console = console
        self._columns = (
            TextColumn(f"{verb} {{task.description}}"),
            BarColumn(),
            MofNCompleteColumn(),
            *columns,
        )
        self._auto_refresh = auto_refresh
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._total = 0
        self._done = 0

    def started(self, total: int, **fields: str) -> None:
        """``total`` steps lie ahead."""
        self._total, self._done = total, 0
        if not self._console.is_terminal or total == 0:
            return
        self._bar = Progress(
            *self._columns,
            console=self._console,
            transient=True,
            auto_refresh=self._auto_refresh,
        )
        self._bar.start()
        self._task = self._bar.add_task("", total=total, **fields)

    def finished(self, name: str, line: str, **fields: str) -> None:
        """A step is done: a bar shows its name, a plain output the line."""
        self._done += 1
        if self._bar is not None:
            self._bar.update(
                self._task,
                advance=1,
                description=name,
                refresh=not self._auto_refresh,
                **fields,
            )
            return
        self._console.print(
            f"[{self._done}/{self._total}] {line}", markup=False, highlight=False, soft_wrap=True
        )

    def ended(self) -> None:
        """Nothing follows; the bar goes away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
