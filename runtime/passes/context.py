"""What a pass may know of the compilation around it. In: the batch range that is compiled now. Out: the same, to whoever runs inside.

It never outlives the ``with`` block that set it, and it never reaches another thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from piecework.runtime.batch.ranges import Range


@dataclass(frozen=True, slots=True)
class PassContext:
    """What a pass may read while it runs.

    Attributes:
        compile_range: the batch sizes of the code that is made; None means all of them.
        facts: what the trace knows of its symbols, as text.
    """

    compile_range: Range | None = None
    facts: str = ""


# A ContextVar is a constant key; the value belongs to the running thread or task.
_CURRENT: ContextVar[PassContext | None] = ContextVar("piecework_pass_context", default=None)


@contextmanager
def pass_context(compile_range: Range | None, facts: str = "") -> Iterator[PassContext]:
    """Tell the passes that run inside which batch range is compiled, and under which facts.

    Example:
        >>> with pass_context(Range(1, 16)):
        ...     manager(graph)
    """
    context = PassContext(compile_range, facts)
    token = _CURRENT.set(context)
    try:
        yield context
    finally:
        _CURRENT.reset(token)


def get_pass_context() -> PassContext:
    """The context of the innermost `pass_context`; one for all batch sizes outside of any."""
    return _CURRENT.get() or PassContext()
