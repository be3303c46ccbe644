"""Captured models as peers have them: in, models around operators that stay outside; out, graphs between live operators, run in order."""

from __future__ import annotations

import collections
import threading
from collections.abc import Iterator

import pytest
import torch
from models import EAGER
from torch import nn

import piecework
from piecework import counters
from piecework.runtime import set_forward_context
from piecework.runtime.graphs.plan.phase import frozen_garbage

LOG: list[str] = []


@piecework.splitting_op("peers::double", mutates_args=("out",), rows="independent")
def double(x: torch.Tensor, out: torch.Tensor, name: str = "double") -> None:
    LOG.append(name)
    out.copy_(x * 2)


@piecework.splitting_op("peers::scaled", rows="independent")
def scaled(x: torch.Tensor) -> torch.Tensor:
    LOG.append("scaled")
    return x * 3


scaled.register_fake(torch.empty_like)


@piecework.splitting_op("peers::outer", mutates_args=("out",), rows="independent")
def outer(x: torch.Tensor, out: torch.Tensor) -> None:
    double(x, out, "inner")
    out.add_(1)


@pytest.fixture(autouse=True, scope="module")
def imports_are_no_garbage() -> Iterator[None]:
    with frozen_garbage():
        yield


@pytest.fixture(autouse=True)
def empty_log() -> None:
    LOG.clear()


class Steps(nn.Module):
    """``x + 1``, then for each name an operator that stays outside, then ``+ 1``."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.names = names

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + 1
        for name in self.names:
            if name == "scaled":
                x = torch.ops.peers.scaled(x)
            else:
                out = torch.empty_like(x)
                if name == "outer":
                    torch.ops.peers.outer(x, out)
                else:
                    torch.ops.peers.double(x, out, name)
                x = out
            x = x + 1
        return x


def captured(
    *names: str, sizes: tuple[int, ...] = (4,), **options: object
) -> piecework.StitchedModule:
    stitched = piecework.compile(Steps(*names), (torch.randn(3, 2),), config=EAGER)
    stitched.capture(list(sizes), progress=False, estimate=False, **options)
    LOG.clear()
    return stitched


def reasons(stitched: piecework.StitchedModule) -> dict[str, int]:
    """How many calls ran for each reason, whichever graph served them."""
    found: collections.Counter[str] = collections.Counter()
    for row in stitched.call_report():
        found[row.reason] += row.calls
    return dict(found)


EXACT, PADDED = "its size is captured", "padded to the next captured size"


def test_without_an_operator_outside_there_is_one_graph() -> None:
    with counters.expect(num_cudagraph_captured=1):
        stitched = captured()
    x = torch.randn(4, 2)
    torch.testing.assert_close(stitched(x), x + 1)


@pytest.mark.parametrize("breaks", [1, 2, 3])
def test_graphs_and_live_operators_alternate(breaks: int) -> None:
    with counters.expect(num_cudagraph_captured=breaks + 1):
        stitched = captured(*(f"step {i}" for i in range(breaks)))
    x = torch.randn(4, 2)
    torch.testing.assert_close(stitched(x), stitched.model(x))
    assert reasons(stitched) == {EXACT: 1}


def test_each_size_has_its_graphs() -> None:
    with counters.expect(num_cudagraph_captured=2 * 3):
        captured("a", "b", sizes=(1, 2))


def test_a_replay_computes_what_the_model_does_for_every_input() -> None:
    stitched = captured("a")
    for value in (10.0, 100.0, -3.0):
        x = torch.full((4, 2), value)
        torch.testing.assert_close(stitched(x), (x + 1) * 2 + 1)


def test_live_operators_run_in_order_at_every_replay() -> None:
    stitched = captured("a", "b", "c")
    for _ in range(3):
        stitched(torch.randn(4, 2))
    assert LOG == ["a", "b", "c"] * 3


def test_an_operator_runs_once_a_call_also_outside_of_graphs() -> None:
    stitched = captured("a", "b")
    stitched(torch.randn(9, 2))
    assert LOG == ["a", "b"]


def test_an_operator_is_a_plain_function_outside_of_a_model() -> None:
    x, out = torch.randn(3), torch.empty(3)
    double(x, out, "plain")
    assert torch.equal(out, x * 2) and LOG == ["plain"]
    assert torch.equal(scaled(x), x * 3)


def test_an_operator_inside_an_operator_runs_inside_it() -> None:
    with counters.expect(num_cudagraph_captured=2):
        stitched = captured("outer")
    x = torch.randn(4, 2)
    torch.testing.assert_close(stitched(x), (x + 1) * 2 + 2)
    assert LOG == ["inner"]


def test_a_new_tensor_from_a_live_operator_reaches_the_next_graph() -> None:
    stitched = captured("scaled", "a", "scaled")
    kept = []
    for _ in range(4):
        x = torch.randn(4, 2)
        kept.append(torch.empty(4, 2))  # another allocation between the calls
        torch.testing.assert_close(stitched(x), stitched.model(x))


def test_a_batch_between_two_sizes_is_padded_and_cut() -> None:
    stitched = captured("a", sizes=(2, 4))
    x = torch.randn(3, 2)
    out = stitched(x)
    assert out.shape == (3, 2)
    torch.testing.assert_close(out, stitched.model(x))
    assert reasons(stitched) == {PADDED: 1}


def test_a_batch_beyond_every_size_runs_uncaptured() -> None:
    stitched = captured("a", sizes=(1, 2, 4))
    x = torch.randn(16, 2)
    torch.testing.assert_close(stitched(x), stitched.model(x))
    assert reasons(stitched) == {"larger than every captured size": 1}


def test_each_captured_size_is_served_from_its_graph() -> None:
    sizes = (1, 2, 4, 8)
    stitched = captured("a", sizes=sizes)
    for size in sizes:
        x = torch.randn(size, 2)
        torch.testing.assert_close(stitched(x), stitched.model(x))
    assert reasons(stitched) == {EXACT: len(sizes)}


def test_a_call_may_ask_to_run_uncaptured_and_only_that_call_does() -> None:
    stitched = captured("a")
    x = torch.randn(4, 2)
    stitched(x)
    with set_forward_context(skip_cuda_graphs=True):
        torch.testing.assert_close(stitched(x), stitched.model(x))
    stitched(x)
    assert reasons(stitched) == {EXACT: 2, "the forward context skips graphs": 1}


def test_a_result_is_not_overwritten_by_the_next_call() -> None:
    stitched = captured("a")
    first = stitched(torch.zeros(4, 2))
    stitched(torch.ones(4, 2))
    assert torch.equal(first, torch.full((4, 2), 3.0))


def test_an_exception_in_a_live_operator_leaves_the_graphs_usable() -> None:
    broken = [False]

    @piecework.splitting_op("peers::breaks", mutates_args=("out",), rows="independent")
    def breaks(x: torch.Tensor, out: torch.Tensor) -> None:
        if broken[0]:
            raise RuntimeError("on purpose")
        out.copy_(x)

    def model(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        breaks(x + 1, out)
        return out * 2

    stitched = piecework.compile(model, (torch.randn(3, 2),), config=EAGER)
    stitched.capture([4], progress=False, estimate=False)
    x = torch.randn(4, 2)
    broken[0] = True
    with pytest.raises(RuntimeError, match="on purpose"):
        stitched(x)
    broken[0] = False
    torch.testing.assert_close(stitched(x), (x + 1) * 2)


def test_two_threads_call_a_captured_model_and_get_their_own_results() -> None:
    stitched = captured("a")
    wrong: list[int] = []

    def work(number: int) -> None:
        x = torch.full((4, 2), float(number))
        for _ in range(20):
            if not torch.equal(stitched(x), (x + 1) * 2 + 1):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_releasing_the_graphs_leaves_a_model_that_runs() -> None:
    stitched = captured("a")
    stitched.static_graphs.release()
    x = torch.randn(4, 2)
    torch.testing.assert_close(stitched(x), stitched.model(x))


def test_capturing_again_with_other_sizes_starts_over() -> None:
    stitched = captured("a", sizes=(2,))
    with counters.expect(num_cudagraph_captured=2):
        stitched.capture([4], progress=False, estimate=False)
    stitched(torch.randn(2, 2))
    assert reasons(stitched) == {PADDED: 1}


def test_equal_outputs_of_a_dictionary_keep_their_structure() -> None:
    def model(x: torch.Tensor) -> dict[str, object]:
        out = torch.empty_like(x)
        double(x, out, "a")
        return {"a": out, "b": (out + 1, 7)}

    stitched = piecework.compile(model, (torch.randn(3, 2),), config=EAGER)
    stitched.capture([4], progress=False, estimate=False)
    x = torch.ones(4, 2)
    found = stitched(x)
    assert list(found) == ["a", "b"] and found["b"][1] == 7
    assert torch.equal(found["a"], x * 2) and torch.equal(found["b"][0], x * 2 + 1)
