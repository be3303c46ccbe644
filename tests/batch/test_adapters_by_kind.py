"""Several adapters in a batch, told by its descriptor: a graph for batches without, and graphs for numbers of adapters, as an engine uses them."""

from __future__ import annotations

import pytest
import torch

import piecework
from piecework.runtime import get_forward_context, set_forward_context
from piecework.runtime.batch.descriptor import BatchKind

EAGER = piecework.CompilationConfig(backend="eager")
WIDTH, RANK, SLOTS = 8, 2, 4


class Bank:
    """Adapters in memory that stays where it is, and which slot each row of a batch takes; -1 is none."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.a, self.b = torch.randn(SLOTS, WIDTH, RANK), torch.randn(SLOTS, RANK, WIDTH)
        self.rows = torch.full((8,), -1)
        self.active = torch.zeros(
            SLOTS, dtype=torch.long
        )  # the slots of this batch, one after the other
        self.runs: list[int] = []


BANK = Bank()


@piecework.splitting_op("by_kind::adapters", mutates_args=("out",), rows="independent")
def adapters(x: torch.Tensor, out: torch.Tensor) -> None:
    context = get_forward_context()
    shape = context.batch_descriptor
    # In a graph the number of adapters is frozen; uncaptured, the batch says its own.
    if shape is not None:
        count = shape.num_active_loras if shape.has_lora else 0
    else:
        count = 0 if context.batch is None else context.batch.num_active_loras
    BANK.runs.append(count)
    out.zero_()
    rows = BANK.rows[: len(x), None]
    for number in range(count):
        slot = BANK.active[number]
        delta = x @ BANK.a.index_select(0, slot[None])[0] @ BANK.b.index_select(0, slot[None])[0]
        out.add_(torch.where(rows == slot, delta, 0.0))


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = torch.nn.Linear(WIDTH, WIDTH), torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        adapters(x, out := torch.empty_like(x))
        return self.leave((self.enter(x) + out).tanh())


def one_by_one(model: Model, x: torch.Tensor, slots: list[int]) -> torch.Tensor:
    """Each row by itself, its adapter added by hand."""
    found = []
    for row, slot in zip(x, slots, strict=True):
        y = model.enter(row)
        y = y if slot < 0 else y + row @ BANK.a[slot] @ BANK.b[slot]
        found.append(model.leave(y.tanh()))
    return torch.stack(found)


def serve(stitched: piecework.StitchedModule, x: torch.Tensor, slots: list[int]) -> torch.Tensor:
    BANK.rows.fill_(-1)
    BANK.rows[: len(slots)] = torch.tensor(slots)
    active = sorted({slot for slot in slots if slot >= 0})
    # A graph for more adapters than there are runs slots that no row takes.
    spare = [slot for slot in range(SLOTS) if slot not in active]
    BANK.active.copy_(torch.tensor([*active, *spare]))
    kind = BatchKind(has_lora=bool(active), num_active_loras=len(active))
    with set_forward_context(batch=kind):
        return stitched(x)


@pytest.mark.parametrize("mode", ["FULL", "PIECEWISE"])
def test_rows_with_adapters_of_their_own(mode: str) -> None:
    model = Model().eval()
    stitched = piecework.compile(model, (torch.randn(4, WIDTH),), config=EAGER)
    stitched.capture([4, 8], mode=mode, lora_counts=(1, 3), progress=False)
    reqs = (" reqs=4", " reqs=8") if mode == "FULL" else ("", "")
    batches = [
        ([-1, -1, -1], f"tokens=4{reqs[0]}"),
        ([0, -1, 0, 0], f"tokens=4{reqs[0]} loras=1"),
        ([0, 1, 2], f"tokens=4{reqs[0]} loras=3"),
        ([3, 1, -1, 1, 3], f"tokens=8{reqs[1]} loras=3"),
        ([0, 1, 2, 3], ""),  # more than any graph has
    ]
    with torch.no_grad():
        for round_ in range(2):
            for slots, _ in batches:
                x = torch.randn(len(slots), WIDTH)
                torch.testing.assert_close(serve(stitched, x, slots), one_by_one(model, x, slots))
            BANK.a[1].copy_(torch.randn(WIDTH, RANK))  # another adapter in the slot, in place
            BANK.b[1].mul_(-round_ - 1)
    graphs = {row.graph: row.calls for row in stitched.call_report()}
    for _, graph in batches:
        found = [calls for name, calls in graphs.items() if name == graph]
        assert found, (graph, graphs)
    told = {(row.graph, row.reason): row.calls for row in stitched.call_report()}
    assert told["", "no graph is captured for this many adapters"] == 2
    assert sum(told.values()) == 10
