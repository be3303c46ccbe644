"""How compiling pieces looks while it runs. In: pieces as they are compiled. Out: a progress bar on a terminal, plain lines elsewhere.

It never decides anything: compilation is the same without it.
"""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.progress import TimeElapsedColumn as Elapsed


class CompileProgress:
    """A bar that moves with each compiled piece, or one line per piece where there is no terminal.

    Args:
        console: where to draw.

    Example:
        >>> backend.compiler_manager.progress = CompileProgress(Console(stderr=True))
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._total = 0
        self._done = 0

    def started(self, total: int) -> None:
        """``total`` compilations lie ahead: different pieces times batch ranges."""
        self._total, self._done = total, 0
        if not self._console.is_terminal or total == 0:
            return
        self._bar = Progress(
            TextColumn("compiling {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            Elapsed(),
            console=self._console,
            transient=True,
            auto_refresh=False,  # its thread would be in the way of forked workers
        )
        self._bar.start()
        self._task = self._bar.add_task("", total=total)

    def finished(self, name: str, seconds: float, how: str = "") -> None:
        """One is done: ``how`` says where, such as "in a worker" or "from the cache"."""
        self._done += 1
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=1, description=name, refresh=True)
            return
        self._console.print(
            f"[{self._done}/{self._total}] {name}: {seconds:.2f} s{f' {how}' if how else ''}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )

    def ended(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar, self._task = None, None
