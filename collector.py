"""Python's garbage collector, held back while objects are made that live long.

A full collection goes through all of torch; imports, traces and emission make it look in vain.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_OFTEN = 500  # smaller collections, of seven thousand new objects each


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
    """Hold the collector back while objects are made that stay; then count them among the oldest.

    Going through them twice took a fifth of loading an artifact.
    """
    with collector_paused():
        yield
        if not gc.get_freeze_count():  # what somebody has frozen stays so
            gc.freeze()
            gc.unfreeze()


@contextmanager
def seldom_full_collections() -> Iterator[None]:
    """Let full collections wait for some million new objects, while a model is traced."""
    *young, old = gc.get_threshold()
    meanwhile = (*young, max(old, _OFTEN))
    gc.set_threshold(*meanwhile)
    try:
        yield
    finally:
        if gc.get_threshold() == meanwhile:  # nobody else has set it since
            gc.set_threshold(*young, old)
