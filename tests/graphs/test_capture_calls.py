"""What calls of a captured model ran as: counted by graph and reason, whatever made them run uncaptured."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from captured import calls, captured
from models import fresh
from ran import Ran
from torch import nn
from torch.overrides import BaseTorchFunctionMode
from torch.utils import _pytree as pytree

import piecework
from piecework.runtime.batch.forward_context import set_forward_context


@pytest.fixture
def stitched():
    return around(fresh)


def around(op):
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    return captured(lambda x: second(op(first(x))), torch.randn(5, 4))


@pytest.mark.parametrize(
    ("scope", "reason"),
    [
        (Ran, "a torch dispatch mode is active"),
        (BaseTorchFunctionMode, "a torch function mode is active"),
        (lambda: set_forward_context(skip_cuda_graphs=True), "the forward context skips graphs"),
    ],
)
def test_calls_that_a_mode_keeps_from_the_graphs_are_calls(stitched, scope, reason: str) -> None:
    x = torch.randn(4, 4)
    expected = stitched(x)
    with scope():
        for _ in range(3):
            torch.testing.assert_close(stitched(x), expected)
    assert calls(stitched) == {reason: 3, "its size is captured": 1}


def test_counts_survive_what_changes_the_answer(stitched) -> None:
    x = torch.randn(3, 4)
    stitched(x)
    stitched(x)
    stitched.static_graphs.release()
    stitched(x)
    stitched(torch.randn(9, 4))
    assert calls(stitched) == {
        "padded to the next captured size": 2,
        "its graph was not captured, or was given up": 1,
        "larger than every captured size": 1,
    }


def test_threads_share_a_captured_model(stitched) -> None:
    def work(number: int) -> None:
        x = torch.full((3, 4), float(number))
        expected = stitched.model(x)
        for _ in range(200):
            torch.testing.assert_close(stitched(x), expected)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert sum(calls(stitched).values()) == 800


class Inner:
    call: Callable[[torch.Tensor], torch.Tensor] | None = None


@piecework.splitting_op("capture_calls::again", rows="independent")
def again(x: torch.Tensor) -> torch.Tensor:
    call, Inner.call = Inner.call, None  # the call inside runs the operator without one
    try:
        return x + (x if call is None else call(x))
    finally:
        Inner.call = call


again.register_fake(torch.empty_like)


def test_a_call_from_inside_a_splitting_op_leaves_the_graphs_alone(monkeypatch) -> None:
    stitched, x = around(again), torch.randn(2, 4)
    results = []
    for call in (stitched.model, stitched):
        monkeypatch.setattr(Inner, "call", call)
        results.append(call(x))
    torch.testing.assert_close(*results)
    assert calls(stitched)["another call is using the graphs, in a thread or around this one"] == 1


LAYER = nn.Linear(4, 4)


def written_twice(x):
    hidden = LAYER(x)
    hidden.add_(1)
    return hidden, hidden.relu_(), hidden * 2


ITSELF = {
    "written": lambda x: (x.add_(1), LAYER(x)),
    "as it came": lambda x: (x.contiguous(), LAYER(x)),
    "one value twice": written_twice,
    "in a list": lambda x: [LAYER(x), {"x": x.float()}, x.mul_(2)],
    "into a buffer": lambda x: (
        torch.add(x, 1, out=(out := torch.empty_like(x))),
        out,
        LAYER(out),
    ),
}


def which(values) -> list[int]:
    """For each tensor, the number of the first that is the same object."""
    first: dict[int, int] = {}
    return [first.setdefault(id(each), number) for number, each in enumerate(values)]


@pytest.mark.parametrize("clone", [True, False])
@pytest.mark.parametrize("name", ITSELF)
def test_results_that_are_one_tensor_or_an_argument_are_so_from_graphs(name: str, clone) -> None:
    model = ITSELF[name]
    stitched = captured(model, torch.randn(4, 4), clone_outputs=clone)
    for count in (4, 3, 2, 1):
        x = torch.randn(count, 4)
        mine, theirs = x.clone(), x.clone()
        with torch.no_grad():
            found, expected = stitched(mine), model(theirs)
        found, expected = (
            [y, *pytree.tree_leaves(z)] for y, z in ((mine, found), (theirs, expected))
        )
        assert which(found) == which(expected)
        torch.testing.assert_close(found, expected)
    assert calls(stitched).keys() == {"its size is captured", "padded to the next captured size"}
