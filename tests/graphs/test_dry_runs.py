"""Runs on dummy inputs (warm-up, estimate, capture) leave no trace in anybody's tensors; weights that move afterwards are noticed."""

from __future__ import annotations

import pytest
import torch
from models import EAGER
from torch import nn

import piecework
from piecework.errors import BindError, StaticGraphError
from piecework.runtime.batch.forward_context import get_forward_context, set_forward_context

hidden = torch.zeros(8, 6)  # state that an operator reaches by itself
runs: list[bool] = []


@piecework.splitting_op("dry_runs::store", mutates_args=("cache", "out"))
def store(x: torch.Tensor, cache: torch.Tensor, out: torch.Tensor) -> None:
    cache[: x.shape[0]].copy_(x)
    cache.index_add_(0, torch.zeros(1, dtype=torch.long), x[:1] + 1)
    out.copy_(cache[: x.shape[0]] + x)


@piecework.splitting_op("dry_runs::remember")
def remember(x: torch.Tensor) -> torch.Tensor:
    hidden[: x.shape[0]] = x + 1
    torch.add(hidden, 1, out=hidden)
    hidden.unsqueeze(0)[0, 1].mul_(3)
    return hidden[: x.shape[0]] * 2


remember.register_fake(torch.empty_like)


@torch.library.custom_op("dry_runs::library", mutates_args=())
def library(x: torch.Tensor) -> torch.Tensor:
    hidden.add_(7)
    return x * 2


library.register_fake(torch.empty_like)


@piecework.splitting_op("dry_runs::act")
def act(x: torch.Tensor) -> None:
    runs.append(get_forward_context().dry)


OPS = [store, remember, act, "dry_runs::library"]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(6, 6), nn.Linear(6, 6)
        self.register_buffer("cache", torch.randn(8, 6))
        self.register_buffer("layers", torch.randn(2, 8, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.enter(x)
        out = torch.empty_like(y)
        store(y, self.cache, out)
        again = torch.empty_like(out)
        store(out, self.layers[1], again)  # a view, made between the pieces
        return self.leave(library(remember(again)))


def compiled(model: nn.Module) -> piecework.StitchedModule:
    x = torch.randn(4, 6)
    torch._dynamo.mark_dynamic(x, 0)
    return piecework.compile(model, (x,), splitting_ops=OPS, config=EAGER)


@pytest.fixture(autouse=True)
def _fresh() -> None:
    hidden.copy_(torch.randn(8, 6))
    runs.clear()


@pytest.mark.sample(2)
@pytest.mark.parametrize("estimate", [False, True])
@pytest.mark.parametrize("mode", ["PIECEWISE", "FULL", "FULL_AND_PIECEWISE"])
def test_a_capture_leaves_every_buffer_as_it_was(mode: str, estimate: bool) -> None:
    model = Model()
    stitched = compiled(model)
    everything = [*model.state_dict(keep_vars=True).values(), hidden]
    before = [tensor.clone() for tensor in everything]
    stitched.capture([2, 4], mode=mode, progress=False, estimate=estimate, warmups=1)
    for now, then in zip(everything, before, strict=True):
        assert torch.equal(now, then)
    # And calls do what they did: they write.
    x = torch.randn(4, 6)
    got, after = stitched(x), [tensor.clone() for tensor in everything]
    for tensor, then in zip(everything, before, strict=True):
        tensor.data.copy_(then)
    with torch.no_grad():
        torch.testing.assert_close(got, model(x))
    for now, then in zip(everything, after, strict=True):
        torch.testing.assert_close(now, then)
    assert not torch.equal(after[-1], before[-1])


def test_a_failed_and_a_stopped_capture_leave_no_trace_either() -> None:
    model = Model()
    stitched = compiled(model)
    before = model.cache.clone(), hidden.clone()

    class Stop:
        def started(self, total: int) -> None: ...

        def finished(self, outcome: object, held_bytes: int) -> None:
            raise KeyboardInterrupt

        def ended(self) -> None: ...

    with pytest.raises(KeyboardInterrupt):
        stitched.capture([2, 4], progress=Stop(), estimate=False)
    with pytest.raises(StaticGraphError):  # too many rows for the cache
        stitched.capture([16], progress=False, estimate=False)
    assert torch.equal(model.cache, before[0]) and torch.equal(hidden, before[1])


class Acts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.enter(x)
        act(y)
        return self.leave(y)


def test_an_op_whose_effects_nobody_sees_is_named_and_told_when_it_runs_dry(warned) -> None:
    stitched = compiled(Acts())
    for mode in ("PIECEWISE", "FULL"):
        stitched.capture([4], mode=mode, progress=False, warmups=1)
        assert "dry_runs.act.default declares neither a result nor a write" in " ".join(warned)
        assert runs[0] is True
        assert all(runs) == (mode == "PIECEWISE"), "in a whole forward it is captured as it serves"
        runs.clear()
        with set_forward_context():
            stitched(torch.randn(4, 6))
        assert runs == [False]
        runs.clear()


# --- weights that move -------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["PIECEWISE", "FULL"])
def test_setting_data_after_a_capture_is_noticed(mode: str) -> None:
    model = Acts()
    stitched = compiled(model)
    options = {"progress": False, "estimate": False, "mode": mode}
    stitched.capture([2, 4], check_addresses=True, **options)
    x = torch.randn(4, 6)
    with set_forward_context(), torch.no_grad():
        torch.testing.assert_close(stitched(x), model(x))
        model.leave.weight.data = torch.randn(6, 6)
        with pytest.raises(StaticGraphError, match=r"leave\.weight was moved after the capture"):
            stitched(x)
        stitched.rebind()  # the graphs are given up
        torch.testing.assert_close(stitched(x), model(x))
        with pytest.raises(BindError, match="nothing is captured"):
            stitched.coverage()
        stitched.capture([2, 4], check_addresses=True, **options)
        torch.testing.assert_close(stitched(x), model(x))
        model.leave.weight.data.copy_(torch.randn(6, 6))  # in place is fine
        torch.testing.assert_close(stitched(x), model(x))
