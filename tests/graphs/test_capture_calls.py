"""What calls of a captured model ran as: counted by graph and reason, whatever made them run uncaptured."""

from __future__ import annotations

import threading

import pytest
import torch
from models import EAGER, fresh
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import piecework
from piecework.runtime.batch.forward_context import set_forward_context


class Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Function(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.fixture
def stitched():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    model = piecework.compile(lambda x: second(fresh(first(x))), (torch.randn(5, 4),), config=EAGER)
    return model.capture([2, 4], progress=False, estimate=False)


def counted(stitched) -> dict[str, int]:
    return {row.reason: row.calls for row in stitched.call_report()}


@pytest.mark.parametrize(
    ("scope", "reason"),
    [
        (Dispatch, "a torch dispatch mode is active"),
        (Function, "a torch function mode is active"),
        (lambda: set_forward_context(skip_cuda_graphs=True), "the forward context skips graphs"),
    ],
)
def test_calls_that_a_mode_keeps_from_the_graphs_are_counted(stitched, scope, reason: str) -> None:
    x = torch.randn(4, 4)
    expected = stitched(x)
    with scope():
        for _ in range(3):
            torch.testing.assert_close(stitched(x), expected)
    assert counted(stitched) == {reason: 3, "its size is captured": 1}


def test_counts_survive_what_changes_the_answer(stitched) -> None:
    x = torch.randn(3, 4)
    stitched(x)
    stitched(x)
    stitched.static_graphs.release()
    stitched(x)
    stitched(torch.randn(9, 4))
    assert counted(stitched) == {
        "padded to the next captured size": 2,
        "its graph was not captured, or was given up": 1,
        "larger than every captured size": 1,
    }


BUSY = "another call is using the graphs, in a thread or around this one"


def test_threads_share_a_captured_model(stitched) -> None:
    wrong: list[int] = []

    def work(number: int) -> None:
        x = torch.full((3, 4), float(number))
        expected = stitched.model(x)
        for _ in range(200):
            if not torch.allclose(stitched(x), expected, atol=1e-5):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert sum(row.calls for row in stitched.call_report()) == 800


@piecework.splitting_op("capture_calls::again", rows="independent")
def again(x: torch.Tensor) -> torch.Tensor:
    return x + INNER["call"](x) if INNER else x + x


again.register_fake(torch.empty_like)


INNER: dict[str, object] = {}


def test_a_call_from_inside_a_splitting_op_leaves_the_graphs_alone() -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    model = piecework.compile(lambda x: second(again(first(x))), (torch.randn(5, 4),), config=EAGER)
    captured = model.capture([2], progress=False, estimate=False)
    x = torch.randn(2, 4)

    def inner(value: torch.Tensor) -> torch.Tensor:
        call = INNER.pop("call")  # the call inside runs the operator without one
        try:
            return captured(value)
        finally:
            INNER["call"] = call

    hidden = first(x)
    expected = second(hidden + second(2 * first(hidden)))
    INNER["call"] = inner
    try:
        torch.testing.assert_close(captured(x), expected)
    finally:
        INNER.clear()
    assert counted(captured)[BUSY] == 1


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
    stitched = piecework.compile(model, (torch.randn(4, 4),), config=EAGER)
    stitched.capture([2, 4], progress=False, estimate=False, clone_outputs=clone)
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
    assert counted(stitched).keys() == {"its size is captured", "padded to the next captured size"}
