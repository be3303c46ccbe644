"""One suite for every static graph: what CUDA promises and how it fails, on the CPU and, where there is one, on a GPU."""

from __future__ import annotations

from collections import namedtuple

import pytest
import torch

from piecework.errors import StaticGraphError
from piecework.runtime.batch.forward_context import get_forward_context, set_forward_context
from piecework.runtime.graphs.memory.owner import platform_for

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    ),
]
Pair = namedtuple("Pair", "left right")


@pytest.fixture(params=DEVICES)
def platform(request):
    return platform_for(request.param)


@pytest.fixture
def pool(platform):
    return platform.new_pool()


@pytest.fixture
def ramp(platform):
    return lambda n: torch.arange(n, device=platform.device, dtype=torch.float32)


@pytest.fixture
def captured(platform, pool):
    def captured(runnable, *args, weak_output=False):
        graph = platform.new_graph(pool)
        return graph, graph.capture(runnable, args, {}, weak_output=weak_output)

    return captured


@pytest.fixture
def replay(platform):
    def replay(*graphs):
        for graph in graphs:
            graph.replay()
        platform.synchronize()

    return replay


def test_replay_reads_the_captured_input_and_writes_the_captured_output(captured, replay, ramp):
    x = ramp(4)
    graph, out = captured(lambda x: x * 2, x)
    address = out.data_ptr()
    for start in (0, 10):
        x.copy_(ramp(4) + start)
        replay(graph)
        assert out.tolist() == [2.0 * (start + i) for i in range(4)]
    assert out.data_ptr() == address


def test_capturing_computes_nothing(platform, captured, replay, ramp):
    x = ramp(3)
    graph, _ = captured(lambda x: x.add_(1), x)
    platform.synchronize()
    assert x.tolist() == [0.0, 1.0, 2.0]
    replay(graph, graph)
    assert x.tolist() == [2.0, 3.0, 4.0]


def test_an_output_that_is_an_input_keeps_its_address(captured, replay, ramp):
    x = ramp(4)
    graph, (same, tail) = captured(lambda x: (x.mul_(2), x[2:]), x)
    replay(graph)
    assert same.data_ptr() == x.data_ptr()
    assert tail.data_ptr() == x[2:].data_ptr()
    assert tail.tolist() == [4.0, 6.0]


def test_outputs_that_overlap_still_overlap(captured, replay, ramp):
    def views(x):
        y = x + 1
        return y, y[1:3], y.view(2, 2).t()

    x = ramp(4)
    graph, (whole, middle, turned) = captured(views, x)
    replay(graph)
    assert middle.data_ptr() == whole.data_ptr() + 4
    assert (turned.data_ptr(), turned.stride()) == (whole.data_ptr(), (1, 2))
    assert turned.tolist() == [[1.0, 3.0], [2.0, 4.0]]


@pytest.mark.parametrize("weak", [False, True])
def test_outputs_may_be_any_tree(captured, replay, ramp, weak):
    def tree(x):
        return {"a": [x + 1, None, 7], "b": Pair(x * 2, ("text", x[:0])), "c": ()}

    x = ramp(2)
    graph, out = captured(tree, x, weak_output=weak)
    x.fill_(5)
    replay(graph)
    assert out["a"][0].tolist() == [6.0, 6.0]
    assert out["a"][1:] == [None, 7]
    assert isinstance(out["b"], Pair)
    assert out["b"].left.tolist() == [10.0, 10.0]
    assert out["b"].right[0] == "text"
    assert out["b"].right[1].shape == (0,)
    assert out["c"] == ()


def test_the_forward_context_is_frozen(captured, replay, ramp):
    def scaled(x):
        return x * get_forward_context().attn_metadata

    x = ramp(3)
    with set_forward_context(2):
        graph, out = captured(scaled, x)
    with set_forward_context(50):
        replay(graph)
    assert out.tolist() == [0.0, 2.0, 4.0]


def test_a_weak_output_gives_its_memory_to_the_next_capture(platform, pool, captured, replay, ramp):
    x = ramp(256)
    first, weak = captured(lambda x: x + 1, x, weak_output=True)
    before = pool.nbytes
    second, other = captured(lambda x: x + 2, x)
    assert other.data_ptr() == weak.data_ptr()
    if platform.device.type == "cpu":
        assert pool.nbytes == before
    replay(first, second)
    assert weak[0].item() == 2.0


def test_a_strong_output_keeps_its_memory(captured, ramp):
    x = ramp(256)
    _, kept = captured(lambda x: x + 1, x)
    _, other = captured(lambda x: x + 2, x)
    assert kept.data_ptr() != other.data_ptr()
    address = kept.data_ptr()
    del kept
    _, reused = captured(lambda x: x + 3, x)
    assert reused.data_ptr() == address


def test_capture_and_replay_in_and_out_of_inference_mode(captured, replay, ramp):
    x = ramp(3)
    with torch.inference_mode():
        graph, out = captured(lambda x: x + 1, x)
        graph.replay()
    x.fill_(4)
    replay(graph)
    assert out.tolist() == [5.0, 5.0, 5.0]


def test_capture_twice_and_replay_of_nothing_are_errors(platform, captured, replay, ramp):
    x = ramp(2)
    graph, out = captured(lambda x: x + 1, x)
    with pytest.raises(StaticGraphError, match="captured already"):
        graph.capture(lambda x: x, (x,), {})
    replay = graph.replay_function()
    x.fill_(5)
    replay()
    platform.synchronize()
    assert out.tolist() == [6.0, 6.0]
    graph.reset()
    with pytest.raises(StaticGraphError, match="nothing was captured"):
        graph.replay_function()
    with pytest.raises(StaticGraphError, match="nothing was captured"):
        graph.replay()
    graph.capture(lambda x: x + 1, (x,), {})
    graph.replay()


def test_a_failing_callable_leaves_a_graph_that_can_capture(platform, pool, replay, ramp):
    x = ramp(2)
    graph = platform.new_graph(pool)

    def fail(x):
        x.add_(1)
        raise ValueError("no such head")

    with pytest.raises(ValueError, match="no such head"):
        graph.capture(fail, (x,), {})
    platform.synchronize()
    assert x.tolist() == [0.0, 1.0]
    out = graph.capture(lambda x: x + 1, (x,), {})
    replay(graph)
    assert out.tolist() == [1.0, 2.0]
