"""Blocks that put back what they change: a context variable, Python's random numbers."""

from __future__ import annotations

import random
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


@contextmanager
def own_random_numbers() -> Iterator[None]:
    """Put back Python's random numbers after the block: importing rich draws one."""
    before = random.getstate()
    try:
        yield
    finally:
        random.setstate(before)
