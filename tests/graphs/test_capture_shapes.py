"""``capture``: arguments and results of every shape: several dynamic sizes, numbers, results without a batch, writes to arguments, layouts."""

from __future__ import annotations

import pytest
import torch
from captured import assert_same, calls, captured
from models import EAGER, fresh
from torch import nn

import piecework
from piecework.errors import ConfigError, StaticGraphError

MODES = ["PIECEWISE", "FULL"]


@piecework.splitting_op("capture_shapes::add", mutates_args=("out",), rows="independent")
def add(x: torch.Tensor, out: torch.Tensor) -> None:
    out.add_(x)


# --- results ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_results_that_do_not_depend_on_the_batch_are_returned_as_they_are(mode: str) -> None:
    weight = nn.Parameter(torch.randn(8, 8), requires_grad=False)

    def model(x, scale):
        rows = fresh(x @ weight)
        return {
            "rows": (rows, [rows.t(), rows[:, :2]]),
            "nothing": None,
            "constant": 7,
            "norm": weight.sum() * 2,
            "scale": scale * 3,
            "grid": x @ x.t(),
            "size": x.shape[0],
            "x": x,
        }

    stitched = captured(model, torch.randn(5, 8), torch.ones(3), unbacked=True, mode=mode)
    for n in range(1, 6):
        assert_same(stitched, model, torch.randn(n, 8), torch.randn(3))
    assert stitched.static_graphs.unpadded is None
    served = {"its size is captured": 2, "padded to the next captured size": 2}
    assert calls(stitched).items() >= served.items()


# --- several dynamic sizes, and numbers ------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("others", [{}, {"x.1": 9, "n": 4}])
def test_other_sizes_are_those_of_the_example_or_those_that_are_named(mode: str, others) -> None:
    def model(x, mask, n):
        return fresh(x * mask) + n, x.shape[1]

    args = torch.randn(5, 6), torch.ones(6), 3
    stitched = captured(model, *args, mode=mode, other_sizes=others)
    wide, number = others.get("x.1", 6), others.get("n", 3)
    for rows in (2, 3, 4):
        for columns in (6, 7, 9):
            for n in (3, 4):
                assert_same(stitched, model, torch.randn(rows, columns), torch.randn(columns), n)
    assert calls(stitched) == {
        "its size is captured": 2,
        "padded to the next captured size": 1,
        "a size beside the batch size is not the captured one": 15,
    }
    held = stitched.static_graphs.static_inputs(4)
    assert held["x"].shape[1] == wide
    assert number in stitched.static_graphs.shape.numbers.values()


@pytest.mark.parametrize(
    ("other", "why"),
    [
        ({"y": 3}, r"no dynamic size 'y'.*there are: x\.1"),
        ({"x.1": 1}, r"size 4 can't be captured: the trace allows x\.1 from 2"),
        ({"x.1": [6]}, r"other_sizes\.x\.1.*should be"),
    ],
)
def test_other_sizes_are_checked(other, why: str) -> None:
    stitched = piecework.compile(lambda x: fresh(x) + 1, (torch.randn(5, 6),), config=EAGER)
    with pytest.raises(ConfigError, match=why):
        stitched.capture([4], other_sizes=other, progress=False)


@pytest.mark.parametrize("declared", [False, True])
def test_sizes_that_equal_the_batch_size_are_checked_at_every_call(declared: bool) -> None:
    """The caller says so, or the example's was equal."""

    def model(x, y):
        return fresh(x) + 1, y * 2

    args = torch.randn(5, 8), torch.randn(5, 3)
    if declared:
        stitched = captured(model, *args, unbacked=True, other_sizes={"y.0": "batch"})
    else:  # where each dimension has a size of its own, with the example's number behind it
        config = EAGER.replace(dynamic_shapes_config={"type": "backed"})
        stitched = piecework.compile(model, args, config=config).capture([2, 4], progress=False)
    for rows, others in ((3, 3), (4, 4), (3, 4), (2, 9)):
        assert_same(stitched, model, torch.randn(rows, 8), torch.randn(others, 3))
    assert calls(stitched) == {
        "its size is captured": 1,
        "padded to the next captured size": 1,
        "a size beside the batch size is not the captured one": 2,
    }
    for wrong, why in (
        ({"z.1": "batch"}, "no dynamic size 'z.1'"),
        ({"y.0": "all"}, "should be"),
    ):
        with pytest.raises(ConfigError, match=why):
            stitched.capture([4], progress=False, other_sizes=wrong)


# --- writes to arguments ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "config"),
    [
        *((mode, EAGER) for mode in MODES),
        # Its kernels write where torch's dispatcher does not look.
        pytest.param("PIECEWISE", piecework.CompilationConfig(), marks=pytest.mark.inductor),
    ],
)
def test_writes_to_arguments_reach_the_caller(mode: str, config) -> None:
    """By a splitting op and by a piece, with and without a batch dimension; rows beyond the batch stay as they are."""

    def model(x, cache, total, steps):
        add(x, cache)
        total.mul_(2)
        steps += 1
        return fresh(cache) + 1

    args = torch.randn(5, 8), torch.zeros(5, 8), torch.zeros(5, 2), torch.zeros(3)
    same_size = {"cache.0": "batch", "total.0": "batch"}
    stitched = captured(
        model, *args, unbacked=True, config=config, mode=mode, other_sizes=same_size
    )
    written = [each.name for each in stitched.static_graphs.shape.staged if each.written]
    assert sorted(written) == ["cache", "steps", "total"]
    for n in range(1, 6):
        assert_same(stitched, model, *(torch.randn(n, w) for w in (8, 8, 2)), torch.randn(3))
    backing = torch.ones(6, 8)
    x, rest = torch.randn(3, 8), (torch.zeros(3, 2), torch.zeros(3))
    stitched(x, backing[:3], *rest)
    torch.testing.assert_close(backing[:3], x + 1)
    assert torch.equal(backing[3:], torch.ones(3, 8))


def test_a_written_argument_that_shares_memory_with_another_runs_uncaptured() -> None:
    def model(x, cache):
        add(x, cache)
        return fresh(x) + 1

    args = torch.randn(5, 8), torch.zeros(5, 8)
    stitched = captured(model, *args, sizes=[4], unbacked=True, other_sizes={"cache.0": "batch"})
    one = torch.randn(8, 8)
    other = one.clone()
    for second in (slice(0, 4), slice(4, 8)):
        with torch.no_grad():
            got = stitched(one[:4], one[second]), one
            want = model(other[:4], other[second]), other
        torch.testing.assert_close(got, want)
    assert calls(stitched) == {
        "an argument that is written to shares memory with another": 1,
        "its size is captured": 1,
    }


def test_what_a_piece_writes_to_a_fresh_tensor_is_brought_back() -> None:
    """The tensor comes from a splitting op, a captured piece changes it, and the next op reads it."""
    linear = nn.Linear(8, 8)

    def model(x):
        y = fresh(x)
        z = linear(y.mul_(2))
        add(z, y)
        return y + 1

    stitched = captured(model, torch.randn(5, 8), unbacked=True)
    code = stitched.static_graphs.source_for(4).code
    assert "changed it in place" in code
    for n in range(1, 6):
        assert_same(stitched, model, torch.randn(n, 8))


# --- layouts and padding ---------------------------------------------------------------------------


def test_what_is_not_contiguous_is_refused() -> None:
    for x in (torch.randn(5, 1).expand(5, 8), torch.randn(8, 5).t()):
        torch._dynamo.mark_dynamic(x, 0)
        with pytest.raises(StaticGraphError, match="traced strided"):
            captured(lambda x: fresh(x) + 1, x, sizes=[4])


def test_tails_are_padded_with_what_was_declared() -> None:
    seen: list[list[int]] = []

    @piecework.splitting_op("capture_shapes::look", rows="independent")
    def look(ids: torch.Tensor) -> torch.Tensor:
        seen.append(ids.tolist())
        return ids * 1

    look.register_fake(torch.empty_like)
    table = torch.randn(9, 4)

    def model(ids):
        return table[look(ids + 0) + 1]

    stitched = captured(
        model, torch.arange(5), sizes=[4], unbacked=True, pads={"ids": -1}, poison=False
    )
    seen.clear()
    assert_same(stitched, model, torch.tensor([3, 5]))
    assert seen[0] == [3, 5, -1, -1]
