"""Context variables. In: a variable and a value. Out: a block in which the running thread or task has that value."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

T = TypeVar("T")


@contextmanager
def set_for(variable: ContextVar[Any], value: T) -> Iterator[T]:
    """``value`` in the block; what was there is back afterwards, also on an exception."""
    token = variable.set(value)
    try:
        yield value
    finally:
        variable.reset(token)
