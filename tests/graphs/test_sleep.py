"""Graphs whose memory is lent out: `StitchedModule.sleep` and `wake_up`, again and again, with calls and changes in between."""

from __future__ import annotations

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from captured import calls
from models import EAGER, Block, mix_pair

import piecework
from piecework.errors import BindError
from piecework.runtime.counters import counters


def block(seed: int = 0, op=mix_pair) -> torch.nn.Module:
    torch.manual_seed(seed)
    return Block(op).eval()


def build() -> tuple[torch.nn.Module, piecework.StitchedModule]:
    model = block()
    return model, piecework.compile(model, (torch.randn(4, 8),), config=EAGER)


def check(model: torch.nn.Module, stitched: piecework.StitchedModule) -> None:
    for size in (1, 3, 4, 9):
        x = torch.randn(size, 8)
        with torch.no_grad():
            torch.testing.assert_close(stitched(x), model(x))


def tensors() -> int:
    gc.collect()
    return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())


@pytest.mark.parametrize("cycles", [6, pytest.param(20, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("mode", ["PIECEWISE", "FULL"])
def test_cycles_serve_the_same_and_keep_nothing(mode: str, cycles: int) -> None:
    model, stitched = build()
    stitched.capture([1, 4], mode=mode, progress=False)
    with counters.expect(num_graphs_seen=0):
        held, alive = [], []
        for cycle in range(cycles):
            graphs = weakref.ref(stitched.static_graphs)
            held.append(stitched.memory_report().held)
            check(model, stitched)
            assert calls(stitched, "mode") == {mode: 3, "NONE": 1}
            stitched.sleep()
            gc.collect()
            assert graphs() is None, "something holds the graphs"
            check(model, stitched)
            with torch.no_grad():
                model.enter.weight.add_(cycle)  # what one lends the memory for
            stitched.wake_up()
            alive.append(tensors())
    assert all(each == held[0] and each for each in held)
    assert len(set(alive[2:])) == 1, alive


def test_asleep_it_says_so_and_a_second_sleep_does_nothing() -> None:
    model, stitched = build()
    with pytest.raises(BindError, match=r"nothing is captured.*capture\(sizes\)"):
        stitched.wake_up()
    stitched.sleep()  # of nothing
    assert not stitched.was_captured
    stitched.capture([2], progress=False)
    for _ in range(2):
        stitched.sleep()
        with pytest.raises(BindError, match=r"nothing is captured.*wake_up\(\)"):
            stitched.coverage()
    assert stitched.was_captured
    check(model, stitched)


def test_a_rebind_gives_graphs_up_and_waking_up_captures_the_new_weights() -> None:
    model, stitched = build()
    stitched.capture([1, 4], progress=False)
    check(model, stitched)
    old = [weakref.ref(each) for each in model.leave.parameters()]
    model.leave = block(2).leave
    stitched.rebind()
    gc.collect()
    assert [each() for each in old] == [None, None]
    check(model, stitched)
    stitched.wake_up()
    check(model, stitched)
    assert calls(stitched, "mode") == {"PIECEWISE": 3, "NONE": 1}


def test_calls_of_other_threads_go_on_through_sleep_and_wake() -> None:
    model, stitched = build()
    stitched.capture([1, 4], progress=False)
    done = threading.Event()

    def serve() -> None:
        while not done.is_set():
            check(model, stitched)

    with ThreadPoolExecutor(3) as pool:
        serving = [pool.submit(serve) for _ in range(3)]
        for _ in range(4):
            stitched.sleep()
            stitched.wake_up()
        done.set()
    for each in serving:
        each.result()
    check(model, stitched)


def test_an_operator_of_the_model_may_put_it_to_sleep_and_its_call_finishes() -> None:
    asks: list[bool] = []

    @piecework.splitting_op("sleep_tests::sleeping", mutates_args=("out",), rows="independent")
    def sleeping(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> None:
        if asks:
            asks.pop()
            stitched.sleep()
        out.copy_(left - 2 * right)

    model = block(op=sleeping)
    stitched = piecework.compile(model, (torch.randn(4, 8),), config=EAGER)
    stitched.capture([4], progress=False)
    x = torch.randn(4, 8)
    with torch.no_grad():
        expected = model(x)
    asks.append(True)
    torch.testing.assert_close(stitched(x), expected)
    with pytest.raises(BindError, match="nothing is captured"):
        stitched.coverage()
    torch.testing.assert_close(stitched(x), expected)
