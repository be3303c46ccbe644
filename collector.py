"""Python's garbage collector, held back. In: a block. Out: the block, in which objects that live long are gone through less often, or not at all.

A full collection goes through all of torch, and imports, traces and emission make objects by the thousand that live until they are done, so that it looks at them in vain.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

# Seven thousand new objects each with Python's own settings, so that garbage which only a full collection finds has a bound.
_OFTEN = 500


@contextmanager
def collector_paused() -> Iterator[None]:
    """Hold back Python's cyclic garbage collector, for emission and captures.

    At 10,000 nodes an emission took three times as long without it, and more the larger the graph.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def lasting() -> Iterator[None]:
    """Hold the collector back while objects are made that stay, such as modules; then count them, as all others of now, among the oldest.

    Going through them once when they are young and once more when they are not took a fifth of loading an artifact.
    """
    with collector_paused():
        yield
        if not gc.get_freeze_count():  # what somebody has frozen stays so
            gc.freeze()
            gc.unfreeze()


@contextmanager
def seldom_full_collections() -> Iterator[None]:
    """Let full collections wait for as many smaller ones as make up some million objects, while a model is traced; the smaller ones go on as before."""
    *young, old = gc.get_threshold()
    meanwhile = (*young, max(old, _OFTEN))
    gc.set_threshold(*meanwhile)
    try:
        yield
    finally:
        if gc.get_threshold() == meanwhile:  # nobody else has set it since
            gc.set_threshold(*young, old)
