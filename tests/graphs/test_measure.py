"""What is measured to be slower is not used: `StitchedModule.measure`, and the choice that it makes."""

from __future__ import annotations

import pytest
import torch
from models import EAGER, Block

import piecework
from piecework.runtime.graphs.serve.report import MeasuredSize, Measurement, measured


@piecework.splitting_op("measure_tests::count", mutates_args=("out", "seen"), rows="independent")
def count(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor, seen: torch.Tensor) -> None:
    out.copy_(left)
    seen.add_(1)


class Counting(Block):
    def __init__(self) -> None:
        super().__init__(lambda left, right, out: count(left, right, out, self.seen))
        self.register_buffer("seen", torch.zeros(1))


@pytest.mark.parametrize(
    ("seconds", "best"),
    [
        ({"eager": 1.0, "stitched": 1.0, "captured": 1.019}, "captured"),
        ({"eager": 2.0, "stitched": 1.0, "captured": 1.021}, "stitched"),
        ({"eager": 0.9, "stitched": 1.0, "captured": 1.0}, "eager"),
        ({"eager": 1.0, "stitched": 0.99}, "stitched"),
    ],
)
def test_nothing_is_used_that_was_slower_by_more_than_a_fiftieth(
    seconds: dict[str, float], best: str
) -> None:
    assert MeasuredSize(4, seconds).best == best


def test_a_size_is_worth_it_if_each_of_its_graphs_is() -> None:
    fast, slow = {"stitched": 2.0, "captured": 1.0}, {"stitched": 1.0, "captured": 2.0}
    rows = (MeasuredSize(1, fast), MeasuredSize(2, fast), MeasuredSize(2, slow))
    assert Measurement(rows, "cpu").worth_capturing == (1,)


def test_ways_take_turns() -> None:
    order: list[str] = []
    ticks = iter(range(1000))
    ways = {name: (lambda name=name: order.append(name)) for name in "ab"}
    found = measured(2, ways, lambda: None, seconds=20, clock=lambda: float(next(ticks)))
    assert order[:6] == ["a", "b", "a", "b", "b", "a"]
    assert found.seconds == {"a": 1.0, "b": 1.0}


@pytest.mark.parametrize("faster", ["captured", "stitched"])
def test_graphs_are_kept_where_they_were_faster(
    monkeypatch: pytest.MonkeyPatch, faster: str
) -> None:
    def judge(size: int, ways: object, device: object, *, seconds: float) -> MeasuredSize:
        for way in ways.values():  # type: ignore[attr-defined]
            way()
        better = faster if size == 4 else "captured"
        return MeasuredSize(size, {**dict.fromkeys(ways, 2.0), better: 1.0})  # type: ignore[call-overload]

    monkeypatch.setattr("piecework.runtime.graphs.serve.report.measured", judge)
    stitched = piecework.compile(Counting().eval(), (torch.randn(4, 8),), config=EAGER)
    found = stitched.measure([2, 4])
    assert found.worth_capturing == ((2, 4) if faster == "captured" else (2,))
    assert not stitched.model.seen.any(), "what calls on dummy inputs wrote was not put back"
    x = torch.randn(4, 8)
    torch.testing.assert_close(stitched(x), stitched.model(x))
    assert [row.mode for row in stitched.call_report()] == [
        "PIECEWISE" if faster == "captured" else "NONE"
    ]
