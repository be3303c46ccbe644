"""What a pass may know of the compilation that it runs in."""

from __future__ import annotations

from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass

from piecework.runtime.batch.ranges import Range
from piecework.scope import set_for


@dataclass(frozen=True, slots=True)
class PassContext:
    """What a pass may read while it runs.

    Attributes:
        compile_range: the batch sizes of the code that is made; None means all of them.
        facts: what the trace knows of its symbols, as text.
    """

    compile_range: Range | None = None
    facts: str = ""


_CURRENT: ContextVar[PassContext | None] = ContextVar("piecework_pass_context", default=None)


def pass_context(
    compile_range: Range | None, facts: str = ""
) -> AbstractContextManager[PassContext]:
    """Tell the passes that run inside which batch range is compiled, and under which facts.

    Example:
        >>> with pass_context(Range(1, 16)):
        ...     manager(graph)
    """
    return set_for(_CURRENT, PassContext(compile_range, facts))


def get_pass_context() -> PassContext:
    """The context of the innermost `pass_context`; one for all batch sizes outside of any."""
    return _CURRENT.get() or PassContext()
