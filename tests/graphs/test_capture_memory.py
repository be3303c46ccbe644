"""What captures hold and show: one buffer a piece for fresh tensors of every size, and names in a profile."""

from __future__ import annotations

import pytest
import torch
from models import EAGER, Layers, fresh
from torch import nn

import piecework


class Returning(nn.Module):
    """An operator that returns what it computed, so that it enters the next piece at a new address each time."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.linear(fresh(x))


@pytest.fixture
def compiled() -> tuple[nn.Module, piecework.StitchedModule]:
    model = Layers(Returning() for _ in range(3))
    return model, piecework.compile(model, (torch.randn(4, 8),), config=EAGER)


def buffers(stitched: piecework.StitchedModule) -> dict[str, set[int]]:
    """Where the static buffers of each piece begin, over all sizes."""
    found: dict[str, set[int]] = {}
    for wrapper in stitched.static_graphs.pieces_for(1):
        for entry in wrapper.concrete_cudagraph_entries.values():
            for copy in entry.copies:
                storage = copy.static.untyped_storage()
                found.setdefault(wrapper.name, set()).add(storage.data_ptr())
    return found


@torch.no_grad()
def test_sizes_of_a_piece_share_one_buffer_for_which_only_the_largest_pays(compiled):
    model, stitched = compiled
    stitched.capture([1, 2, 4, 8, 16], progress=False)
    found = buffers(stitched)
    assert len(found) == 3 and all(len(own) == 1 for own in found.values())
    assert len(set.union(*found.values())) == 3
    for size in (1, 16, 3, 8, 2, 16, 5):
        x = torch.randn(size, 8)
        torch.testing.assert_close(stitched(x), model(x))
    records = stitched.static_graphs.graphs.records
    paid = {record.descriptor.num_tokens: 0 for record in records}
    for record in records:
        paid[record.descriptor.num_tokens] += record.staged_bytes
    assert paid == {16: 3 * 16 * 8 * 4, 8: 0, 4: 0, 2: 0, 1: 0}
    report = stitched.memory_report()
    assert report.estimate.total == report.total


@torch.no_grad()
def test_replays_staging_and_captures_have_names_in_a_profile(compiled):
    model, stitched = compiled
    with torch.profiler.profile() as capturing:
        stitched.capture([2, 4], mode="FULL_AND_PIECEWISE", progress=False, estimate=False)
    keys = {event.key for event in capturing.key_averages()}
    made = [key for key in keys if key.startswith("capture ")]
    assert len([key for key in made if key.endswith("PIECEWISE tokens=4")]) == 4, made
    x = torch.randn(3, 8)
    with torch.profiler.profile() as named, stitched.named_pieces():
        result = stitched(x)
    torch.testing.assert_close(result, model(x))
    keys = {event.key for event in named.key_averages()}
    replays = [key for key in keys if key.startswith("replay ") and "PIECEWISE tokens=4" in key]
    assert len(replays) == 4 and any("layers.1" in key for key in replays)
    assert "stage inputs" in keys and any("fresh" in key for key in keys)
    with torch.profiler.profile() as plain:
        stitched(x)
    assert not any(event.key.startswith("replay ") for event in plain.key_averages())
