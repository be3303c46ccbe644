"""The capture phase on a small stitched model: order, warm-ups, interruption, failure, progress, memory, budget."""

from __future__ import annotations

import gc
import io
import weakref

import pytest
from hand_captured import HandCaptured
from rich.console import Console

from piecework.errors import StaticGraphError
from piecework.runtime.batch.descriptor import BatchDescriptor
from piecework.runtime.batch.mode import CUDAGraphMode
from piecework.runtime.graphs.plan.phase import (
    CaptureProgress,
    MemoryModel,
    cost_of,
    estimate_memory,
)

NONE, PIECEWISE, FULL = CUDAGraphMode.NONE, CUDAGraphMode.PIECEWISE, CUDAGraphMode.FULL
BOTH = CUDAGraphMode.FULL_AND_PIECEWISE


def lines(**options):
    return Console(file=io.StringIO(), force_terminal=False, width=200, **options)


def test_everything_is_captured_largest_first_and_serves_every_size():
    model = HandCaptured()
    report = model.capture()
    assert [(m, n) for m, n in model.runs] == [
        (m, n) for m in (PIECEWISE, FULL) for n in (8, 4, 2, 1)
    ]
    assert [o.pieces for o in report.outcomes] == [3] * 4 + [1] * 4
    assert len(report.captured) == 8
    assert not model.graphs.is_open
    modes = model.check_all(model.largest + 1)
    assert {m for (n, uniform), m in modes.items() if n <= 8 and uniform} == {FULL}
    assert {m for (n, uniform), m in modes.items() if n <= 8 and not uniform} == {PIECEWISE}
    assert {m for (n, _), m in modes.items() if n > 8} == {NONE}


def test_a_forward_that_captures_nothing_is_an_error():
    model = HandCaptured(mode=PIECEWISE, sizes=(1,), warmups=2)
    with pytest.raises(StaticGraphError, match="the forward captured nothing"):
        model.capture(warmups=1)


class Cycle:
    def __init__(self):
        self.itself = self


class Littering(HandCaptured):
    """Leaves garbage that only a collection finds before each run, and tells inside of it what is still there."""

    def dummy(self, descriptor):
        self.litter.append(weakref.ref(Cycle()))
        return super().dummy(descriptor)

    def split(self, *told):
        self.found += [each() for each in self.litter]
        return super().split(*told)


def test_garbage_is_collected_before_each_capture():
    model = Littering(mode=PIECEWISE, sizes=(1, 2, 4))
    old = Cycle()
    model.litter, model.found = [weakref.ref(old)], []
    gc.collect()  # so that it is among the oldest
    del old
    gc.disable()
    try:
        model.capture()
    finally:
        gc.enable()
    assert model.found and not any(model.found)


def test_progress_on_plain_output():
    console = lines()
    HandCaptured(mode=PIECEWISE, sizes=(1, 2)).capture(watcher=CaptureProgress(console))
    text = console.file.getvalue().splitlines()
    assert len(text) == 2
    assert text[0].startswith("[1/2] PIECEWISE tokens=2: captured, ")
    assert text[1].startswith("[2/2] PIECEWISE tokens=1: captured, ")
    assert text[1].endswith(" held")


# --- memory ----------------------------------------------------------------------------------------


@pytest.mark.sample(3)
@pytest.mark.parametrize("mode", [PIECEWISE, FULL, BOTH])
@pytest.mark.parametrize("policy", ["copy", "eager"])
def test_the_estimate_is_within_a_tenth(mode, policy):
    sizes = (1, 2, 4, 8, 16, 24, 32, 48, 64)
    model = HandCaptured(mode=mode, sizes=sizes, policy=policy)
    descs = model.dispatcher.get_capture_descs()
    estimate = estimate_memory(model.dummy, descs, model.graphs)
    assert (model.graphs.records, model.graphs.nbytes, model.graphs.is_open) == ([], 0, False)
    assert len(estimate.rows) == sum(len(group) for _, group in descs)
    assert len(estimate.measured) == 4 * len(descs)
    actual = model.capture().nbytes
    assert actual > 0
    assert estimate.total == pytest.approx(actual, rel=0.1)
    assert str(estimate).startswith("captures will take ")
    assert f"({4 * len(descs)} of {len(estimate.rows)} sizes were measured)" in str(estimate)
    model.check_all(model.largest + 1)


def test_estimating_after_capturing_is_an_error():
    model = HandCaptured(mode=PIECEWISE, sizes=(2,))
    model.capture()
    with pytest.raises(StaticGraphError, match="can't be estimated once graphs are captured"):
        estimate_memory(model.dummy, model.dispatcher.get_capture_descs(), model.graphs)


def test_kinds_share_the_pool_and_a_smaller_size_adds_its_step():
    kinds = [(mode, BatchDescriptor(0)) for mode in (PIECEWISE, FULL)]
    known = MemoryModel(30.0, 5.0, 1.0), MemoryModel(20.0, 0.0)
    models = dict(zip(kinds, known, strict=True))
    pieces, whole = ((mode, BatchDescriptor(8)) for mode in (PIECEWISE, FULL))
    assert cost_of([pieces], models) == 240 + 13
    assert cost_of([pieces, (PIECEWISE, BatchDescriptor(2)), whole], models) == 240 + 13 + 7
    assert cost_of([], models) == 0
