"""Python's garbage collector is set as it was once a model is traced, whatever happened meanwhile."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

import pytest
import torch
from models import EAGER
from processes import python

import piecework
from piecework.collector import seldom_full_collections
from piecework.errors import PieceworkError


@pytest.fixture(autouse=True)
def own_thresholds() -> Iterator[None]:
    before = gc.get_threshold()
    gc.set_threshold(600, 9, 8)
    yield
    gc.set_threshold(*before)


def fails(x: torch.Tensor) -> torch.Tensor:
    raise ValueError("no")


@pytest.mark.parametrize(
    ("model", "outcome"),
    [(lambda x: x + 1, contextlib.nullcontext()), (fails, pytest.raises(PieceworkError))],
)
def test_the_thresholds_are_those_of_before(model, outcome) -> None:
    with outcome:
        piecework.compile(model, (torch.randn(2, 3),), config=EAGER)
    assert gc.get_threshold() == (600, 9, 8)


def test_blocks_of_two_threads_may_end_in_any_order() -> None:
    first, second = seldom_full_collections(), seldom_full_collections()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert gc.get_threshold() == (600, 9, 8)


@pytest.mark.parametrize("enabled", [True, False])
def test_what_a_package_hands_on_is_imported_without_collections(enabled: bool) -> None:
    """In a new process, since each module is imported once; the collector is as it was afterwards."""
    script = f"""
import gc, torch, piecework
{"" if enabled else "gc.disable()"}
gc.collect()
before = [each["collections"] for each in gc.get_stats()]
piecework.compile
assert [each["collections"] for each in gc.get_stats()][1:] == before[1:]
assert gc.isenabled() is {enabled}
gc.collect()  # so that none of the smaller collections is due
made = []
piecework.compile
assert any(each is made for each in gc.get_objects(0))  # it is imported: nothing is counted among the oldest again
try:
    piecework.compil
except AttributeError:
    pass
assert gc.isenabled() is {enabled}
"""
    python("-c", script)
