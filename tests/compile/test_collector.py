"""Python's garbage collector is set as it was once a model is traced, whatever happened meanwhile."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from models import EAGER

import piecework
from piecework.errors import PieceworkError
from piecework.runtime.traces.collector import seldom_full_collections


@pytest.fixture(autouse=True)
def own_thresholds() -> Iterator[None]:
    before = gc.get_threshold()
    gc.set_threshold(600, 9, 8)
    yield
    gc.set_threshold(*before)


class Model(torch.nn.Module):
    def __init__(self, fails: bool) -> None:
        super().__init__()
        self.fails = fails

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.fails:
            raise ValueError("no")
        return x + 1


@pytest.mark.parametrize("fails", [False, True])
def test_the_thresholds_are_those_of_before(fails: bool) -> None:
    if fails:
        with pytest.raises(PieceworkError):
            piecework.compile(Model(True), (torch.randn(2, 3),), config=EAGER)
    else:
        piecework.compile(Model(False), (torch.randn(2, 3),), config=EAGER)
    assert gc.get_threshold() == (600, 9, 8)


def test_the_smaller_collections_go_on() -> None:
    with seldom_full_collections():
        young, middle, old = gc.get_threshold()
        assert (young, middle) == (600, 9) and old > 8
        with seldom_full_collections():
            assert gc.get_threshold() == (young, middle, old)
        assert gc.get_threshold() == (young, middle, old)
    assert gc.get_threshold() == (600, 9, 8)


def test_blocks_of_two_threads_may_end_in_any_order() -> None:
    first, second = seldom_full_collections(), seldom_full_collections()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert gc.get_threshold() == (600, 9, 8)


def test_what_somebody_sets_meanwhile_stays() -> None:
    with seldom_full_collections():
        gc.set_threshold(700, 10, 3)
    assert gc.get_threshold() == (700, 10, 3)
