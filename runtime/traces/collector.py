"""Python's garbage collector while a model is traced. In: a block. Out: the block, in which objects that live long are gone through less often.

A trace makes a million objects that live until it is done, and each full collection goes through all of them in vain.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

# Seven thousand new objects each with Python's own settings, so that garbage which only a full collection finds has a bound.
_OFTEN = 500


@contextmanager
def seldom_full_collections() -> Iterator[None]:
    """Let full collections wait for as many smaller ones as make up some million objects; the smaller ones go on as before."""
    *young, old = gc.get_threshold()
    meanwhile = (*young, max(old, _OFTEN))
    gc.set_threshold(*meanwhile)
    try:
        yield
    finally:
        if gc.get_threshold() == meanwhile:  # nobody else has set it since
            gc.set_threshold(*young, old)
