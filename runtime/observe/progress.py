"""Long work, shown while it runs: a bar on a terminal, a line per step elsewhere."""

from __future__ import annotations

import logging
import time
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import TYPE_CHECKING

from piecework.scope import own_random_numbers, set_for

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, ProgressColumn

_log = logging.getLogger(__name__)


class StepBar:
    """A bar that moves with each step, or plain lines where the console is no terminal."""

    def __init__(
        self,
        console: Console | None,
        verb: str,
        *columns: ProgressColumn,
        auto_refresh: bool = True,
        patience: float = 0.0,  # seconds in which nothing is shown
    ) -> None:
        self._console, self._verb, self._columns = console, verb, columns
        self._auto_refresh, self._patience = auto_refresh, patience
        self._bar: Progress | None = None
        self._waiting: list[str] = []
        self._fields: dict[str, str] = {}
        self._total = self._done = 0
        self.begin()

    def begin(self) -> None:
        """The work begins now, which is what patience is counted from."""
        self._shown_from = time.monotonic() + self._patience
        self._waiting.clear()

    def started(self, total: int, **fields: str) -> None:
        """``total`` steps lie ahead."""
        self._total, self._done, self._fields = total, 0, fields
        if total and time.monotonic() >= self._shown_from and self._screen().is_terminal:
            self._draw()

    def note(self, line: str) -> None:
        """Something to say besides the steps; a bar leaves it out."""
        self._waiting.append(line)
        if time.monotonic() >= self._shown_from:
            screen = self._screen()
            for each in () if screen.is_terminal else self._waiting:
                screen.print(each, markup=False, highlight=False, soft_wrap=True)
            self._waiting.clear()

    def finished(self, name: str, line: str, **fields: str) -> None:
        """A step is done: a bar shows its name, a plain output the line."""
        self._done += 1
        self._fields |= fields
        self.note(f"[{self._done}/{self._total}] {line}")
        if time.monotonic() < self._shown_from or not self._screen().is_terminal:
            return
        bar = self._bar or self._draw()
        bar.update(
            bar.task_ids[0],
            completed=self._done,
            description=name,
            refresh=not self._auto_refresh,
            **self._fields,  # type: ignore[arg-type]
        )

    def ended(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _screen(self) -> Console:
        # Made when there is something to show: a service that loads an artifact does without rich.
        if self._console is None:
            with own_random_numbers():
                from rich.console import Console

            self._console = Console(stderr=True)
        return self._console

    def _draw(self) -> Progress:
        with own_random_numbers():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._bar = Progress(
            TextColumn(f"{self._verb} {{task.description}}"),
            BarColumn(),
            MofNCompleteColumn(),
            *self._columns,
            console=self._screen(),
            transient=True,
            auto_refresh=self._auto_refresh,
        )
        self._bar.start()
        self._bar.add_task("", total=self._total, **self._fields)  # type: ignore[arg-type]
        return self._bar


class CompileProgress(StepBar):
    """What is shown of a model that is compiled: its trace, then each different piece."""

    def __init__(self, console: Console | None = None, *, patience: float = 0.0) -> None:
        # A thread that redraws would be in the way of forked workers.
        super().__init__(console, "compiling", auto_refresh=False, patience=patience)

    def compiled(self, name: str, seconds: float, how: str = "") -> None:
        """A piece is done: ``how`` says where, such as "in a worker" or "from the cache"."""
        self.finished(name, f"{name}: {seconds:.2f} s{f' {how}' if how else ''}")


_SHOWN: ContextVar[CompileProgress | None] = ContextVar("piecework_compile_progress", default=None)
PATIENCE = 5.0  # seconds; what is done sooner is not worth a line


def current_progress() -> CompileProgress:
    """What `show_progress` has set in this context, or one that speaks up when it takes long."""
    return _SHOWN.get() or CompileProgress(patience=PATIENCE)


def show_progress(progress: CompileProgress) -> AbstractContextManager[object]:
    """For the block, ``progress`` is told of every model that is compiled in this context."""
    return set_for(_SHOWN, progress)


def warn_of_another(what: str, why: str, seconds: float, cure: str) -> None:
    """Warn of a trace or a compilation that came with a call, after the first."""
    _log.warning("%s again, while a call waited %.1f s: %s. %s", what, seconds, why, cure)
