"""The capture phase on a small stitched model: order, warm-ups, interruption, failure, progress, memory, budget."""

from __future__ import annotations

import gc
import io
import weakref
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from piecework.errors import StaticGraphError
from piecework.runtime.batch.descriptor import BatchDescriptor
from piecework.runtime.batch.dispatcher import CudagraphDispatcher
from piecework.runtime.batch.forward_context import get_forward_context, set_forward_context
from piecework.runtime.batch.mode import CUDAGraphMode
from piecework.runtime.graphs.memory.owner import StaticGraphs
from piecework.runtime.graphs.memory.wrapper import CUDAGraphWrapper, wrap_with_cudagraph_if_needed
from piecework.runtime.graphs.plan.estimate import (
    MemoryModel,
    cost_of,
    estimate_memory,
)
from piecework.runtime.graphs.plan.phase import CaptureProgress, capture_graphs

NONE, PIECEWISE, FULL = CUDAGraphMode.NONE, CUDAGraphMode.PIECEWISE, CUDAGraphMode.FULL
BOTH = CUDAGraphMode.FULL_AND_PIECEWISE


class Model:
    """Three pieces around two splitting ops that return fresh tensors; serves batches of up to ``largest`` rows."""

    def __init__(self, mode=BOTH, sizes=(1, 2, 4, 8), policy="copy", warmups=0, hidden=16):
        torch.manual_seed(0)
        self.largest = max(sizes)
        self.graphs = StaticGraphs("cpu", address_policy=policy)
        self.dispatcher = CudagraphDispatcher(mode, sizes, max_num_seqs=self.largest)
        self.weights = {f"w{i}": torch.randn(hidden, hidden) / hidden**0.5 for i in range(3)}
        self.graphs.addresses.register_weights(self.weights)
        self.x = torch.zeros(self.largest, hidden)
        self.graphs.addresses.register_persistent("x", self.x)
        config = SimpleNamespace(cudagraph_mode=mode, cudagraph_num_of_warmups=warmups)
        self.runs = []
        self.pieces = [
            wrap_with_cudagraph_if_needed(
                self.piece, config, i == 0, i == 2, graphs=self.graphs, name=f"submod_{2 * i}"
            )
            for i in range(3)
        ]
        self.full = CUDAGraphWrapper(self.stitched, config, FULL, graphs=self.graphs)
        self.kept = []

    @staticmethod
    def piece(x, w):
        return torch.tanh(x @ w) + x

    def attention(self, x):
        self.kept = [*self.kept[-8:], x.flip(-1) * 0.5]
        return self.kept[-1]

    def stitched(self, x):
        for i, piece in enumerate(self.pieces):
            x = piece(x, self.weights[f"w{i}"])
            if i < 2:
                x = self.attention(x)
        return x

    def dummy(self, descriptor):
        context = get_forward_context()
        self.runs.append((context.cudagraph_runtime_mode, descriptor.num_tokens))
        return self.full(self.x[: descriptor.num_tokens])

    def eager(self, x):
        for i in range(3):
            x = self.piece(x, self.weights[f"w{i}"])
            if i < 2:
                x = x.flip(-1) * 0.5
        return x

    def serve(self, rows, uniform=False):
        n = rows.shape[0]
        mode, descriptor = self.dispatcher.dispatch(n, uniform)
        if n > self.largest:
            return mode, self.stitched(rows)
        self.x[:n].copy_(rows)
        # Whatever is beyond the batch must not reach it.
        self.x[n:].fill_(float("nan"))
        with set_forward_context(cudagraph_runtime_mode=mode, batch_descriptor=descriptor):
            return mode, self.full(self.x[: descriptor.num_tokens])[:n].clone()

    def capture(self, **options):
        options.setdefault("dispatcher", self.dispatcher)
        return capture_graphs(
            self.dummy, self.dispatcher.get_capture_descs(), self.graphs, **options
        )

    def check(self):
        """Every size, both kinds, equals the eager model; returns the modes that were used."""
        modes = {}
        for n in range(1, self.largest + 2):
            for uniform in (False, True):
                rows = torch.randn(n, self.x.shape[1])
                mode, out = self.serve(rows, uniform)
                torch.testing.assert_close(out, self.eager(rows))
                modes[n, uniform] = mode
        return modes


def lines(**options):
    return Console(file=io.StringIO(), force_terminal=False, width=200, **options)


def test_everything_is_captured_largest_first_and_serves_every_size():
    model = Model()
    report = model.capture()
    assert [(m, n) for m, n in model.runs] == [
        (m, n) for m in (PIECEWISE, FULL) for n in (8, 4, 2, 1)
    ]
    assert [o.pieces for o in report.outcomes] == [3] * 4 + [1] * 4
    assert len(report.captured) == 8
    assert not model.graphs.is_open
    modes = model.check()
    assert {m for (n, uniform), m in modes.items() if n <= 8 and uniform} == {FULL}
    assert {m for (n, uniform), m in modes.items() if n <= 8 and not uniform} == {PIECEWISE}
    assert {m for (n, _), m in modes.items() if n > 8} == {NONE}


def test_a_forward_that_captures_nothing_is_an_error():
    model = Model(mode=PIECEWISE, sizes=(1,), warmups=2)
    with pytest.raises(StaticGraphError, match="the forward captured nothing"):
        model.capture(warmups=1)


class Cycle:
    def __init__(self):
        self.itself = self


class Littering(Model):
    """Leaves garbage that only a collection finds before each run, and tells inside of it what is still there."""

    def dummy(self, descriptor):
        self.litter.append(weakref.ref(Cycle()))
        return super().dummy(descriptor)

    def attention(self, x):
        self.found += [each() for each in self.litter]
        return super().attention(x)


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
    Model(mode=PIECEWISE, sizes=(1, 2)).capture(watcher=CaptureProgress(console))
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
    model = Model(mode=mode, sizes=sizes, policy=policy)
    descs = model.dispatcher.get_capture_descs()
    estimate = estimate_memory(model.dummy, descs, model.graphs)
    assert (model.graphs.records, model.graphs.nbytes, model.graphs.is_open) == ([], 0, False)
    assert len(estimate.rows) == sum(len(group) for _, group in descs)
    assert len(estimate.measured) == 3 * len(descs)
    actual = model.capture().nbytes
    assert actual > 0
    assert estimate.total == pytest.approx(actual, rel=0.1)
    assert str(estimate).startswith("captures will take ")
    assert f"({3 * len(descs)} of {len(estimate.rows)} sizes were measured)" in str(estimate)
    model.check()


def test_estimating_after_capturing_is_an_error():
    model = Model(mode=PIECEWISE, sizes=(2,))
    model.capture()
    with pytest.raises(StaticGraphError, match="can't be estimated once graphs are captured"):
        estimate_memory(model.dummy, model.dispatcher.get_capture_descs(), model.graphs)


KINDS = [(mode, BatchDescriptor(0)) for mode in (PIECEWISE, FULL)]


def key(size, mode=PIECEWISE):
    return mode, BatchDescriptor(size)


def test_what_was_measured_tells_the_rest():
    model = MemoryModel.fit({8: 1050, 2: 50}, alone=(2, 450))
    assert (model.per_token, model.fixed) == (100.0, 200.0)
    assert cost_of([key(4)], {KINDS[0]: model}) == 650
    one = {KINDS[0]: MemoryModel.fit({8: 800}, alone=(8, 800))}
    assert [cost_of(map(key, sizes), one) for sizes in ([8], [4, 2], [])] == [800, 400, 0]
    # A smaller size can't need more of the pool than the largest.
    assert MemoryModel.fit({8: 800, 4: 0}, alone=(4, 900)).fixed == 800.0


def test_kinds_share_the_pool():
    models = {KINDS[0]: MemoryModel(10.0, 0.0, ((4, 5),)), KINDS[1]: MemoryModel(20.0)}
    assert cost_of([key(8), key(2, FULL)], models) == 80 + 5
    assert cost_of([key(8), key(8, FULL)], models) == 160 + 5
