"""How compiling pieces looks while it runs. In: pieces as they are compiled. Out: a progress bar on a terminal, plain lines elsewhere.

It never decides anything: compilation is the same without it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import TYPE_CHECKING

from piecework.scope import set_for

if TYPE_CHECKING:
    from rich.console import Console


class CompileProgress:
    """A bar that moves with each compiled piece, or one line per piece where there is no terminal.

    Args:
        console: where to draw.

    Example:
        >>> with show_progress(CompileProgress(Console(stderr=True))):
        ...     stitched = piecework.compile(model, (x,))
    """

    def __init__(self, console: Console) -> None:
        # Bars are drawn by the command line; a service that loads an artifact does without rich.
        from rich.progress import TimeElapsedColumn

        from piecework.runtime.observe.step_bar import StepBar

        # A thread that redraws would be in the way of forked workers.
        self._bar = StepBar(console, "compiling", TimeElapsedColumn(), auto_refresh=False)

    def started(self, total: int) -> None:
        """``total`` compilations lie ahead: different pieces times batch ranges."""
        self._bar.started(total)

    def finished(self, name: str, seconds: float, how: str = "") -> None:
        """One is done: ``how`` says where, such as "in a worker" or "from the cache"."""
        self._bar.finished(name, f"{name}: {seconds:.2f} s{f' {how}' if how else ''}")

    def ended(self) -> None:
        self._bar.ended()


_SHOWN: ContextVar[CompileProgress | None] = ContextVar("piecework_compile_progress", default=None)


def current_progress() -> CompileProgress | None:
    """What `show_progress` has set in this context."""
    return _SHOWN.get()


def show_progress(progress: CompileProgress) -> AbstractContextManager[object]:
    """For the block, ``progress`` is told of the pieces of every model that is compiled in this context."""
    return set_for(_SHOWN, progress)
