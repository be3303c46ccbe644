"""Where a model calls no splitting op, it is cut at repeated blocks. In: encoders and stacks of blocks that differ in this and that. Out: few different pieces whatever the depth, and eager's results."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import piecework
from piecework.errors import SplitError

EAGER = {"backend": "eager"}


@piecework.splitting_op("repeated_blocks::double", mutates_args=("out",))
def double(x: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(x * 2)


class Block(nn.Module):
    """Nine operators; what it may differ in is an argument."""

    def __init__(self, scale: float = 1.0, width: int = 8, hidden: int = 16) -> None:
        super().__init__()
        self.norm, self.gate = nn.LayerNorm(width), nn.Linear(width, hidden)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return x + self.down(torch.relu(self.up(y)) * torch.sigmoid(self.gate(y))) * self.scale


class Stack(nn.Module):
    """Blocks between an embedding and a head."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.first, self.blocks, self.head = nn.Linear(8, 8), nn.ModuleList(blocks), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.first(x))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def blocks_of(count: int, **arguments: float) -> list[nn.Module]:
    return [Block(**arguments) for _ in range(count)]  # type: ignore[arg-type]


def pieces(model: nn.Module, x: torch.Tensor, **config: object) -> tuple[int, int]:
    """How many pieces there are and how many different ones, after the results were compared for other batches."""
    model.eval()
    stitched = piecework.compile(model, (x,), config={**EAGER, **config})
    for rows in (len(x), 1, 2, 5):
        other = torch.randn(rows, *x.shape[1:])
        torch.testing.assert_close(stitched(other), model(other), rtol=0, atol=0)
    report = stitched.report()
    return report.pieces, report.unique


X = torch.randn(4, 8)


def test_pieces_do_not_grow_with_depth() -> None:
    assert pieces(Stack(blocks_of(4)), X) == (6, 3)
    assert pieces(Stack(blocks_of(20)), X) == (22, 3)


def test_one_block_that_is_called_again_and_again() -> None:
    class Recycled(Stack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.tanh(self.first(x))
            for _ in range(6):
                x = self.blocks[0](x)
            return self.head(x)

    assert pieces(Recycled([Block()]), X) == (8, 3)


def test_a_block_that_differs_is_left_beside_the_rest() -> None:
    scaled = [*blocks_of(4), Block(scale=0.5), *blocks_of(4)]
    # It begins where the fourth ends, and ends where the next one begins.
    number, unique = pieces(Stack(scaled), X)
    assert (number, unique) == (10, 4)


@pytest.mark.parametrize(
    ("blocks", "why"),
    [
        ([nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(6)], "small"),
        (blocks_of(3), "few"),
        ([Block(scale=i + 1.5) for i in range(6)], "all different"),
    ],
)
def test_what_is_not_cut(blocks: list[nn.Module], why: str) -> None:
    assert pieces(Stack(blocks), X) == (1, 1), why


def test_convolutions_stay_with_each_other() -> None:
    class Convolutions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for part in self.parts:
                x = torch.relu(part(x)) * 2 + 1
            return x

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            blocks = nn.Sequential(*(Convolutions() for _ in range(4)))
            self.holder = nn.ModuleDict({"blocks": blocks})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.holder["blocks"](x)

    x = torch.randn(4, 3, 6, 6)
    assert pieces(Named(), x) == (1, 1)
    assert pieces(Named(), x, repeated_blocks=["holder.blocks"]) == (4, 1)


def test_blocks_by_name() -> None:
    model = Stack([nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2)])
    assert pieces(model, X, repeated_blocks=["blocks"]) == (4, 3)
    with pytest.raises(SplitError, match="'layers'") as error:
        pieces(model, X, repeated_blocks=["blocks", "layers"])
    assert "encoder.layers" in str(error.value.hint)


@pytest.mark.parametrize("config", [{"repeated_blocks": "off"}, {"splitting_ops": []}])
def test_it_can_be_left(config: dict[str, object]) -> None:
    assert pieces(Stack(blocks_of(4)), X, **config) == (1, 1)


def test_a_splitting_op_decides_alone_where_to_cut() -> None:
    class Cut(Stack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = super().forward(x)
            double(x, out := torch.empty_like(x))
            return out + 1

    assert pieces(Cut(blocks_of(5)), X)[0] == 2


def test_what_crosses_a_border() -> None:
    """Several values, views, a value of the first block that the last one reads, and one that is written in between."""

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: torch.Tensor, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = self.block(x)
            kept.add_(y.sum(1))
            return y.view(-1, 2, 4).transpose(1, 2).reshape(-1, 8), kept

    class Passing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Wide() for _ in range(5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            kept, first = x.sum(1), x[:, :2]
            for block in self.blocks:
                x, kept = block(x, kept)
            return torch.cat([x, kept[:, None], first], 1)

    number, unique = pieces(Passing(), X)
    assert number >= 5 and unique <= 3


def test_captured_saved_and_loaded(tmp_path: Path) -> None:
    model = Stack(blocks_of(6)).eval()
    stitched = piecework.compile(model, (X,), config=EAGER)
    stitched.capture([1, 4])
    for rows in (1, 3, 4, 6):
        x = torch.randn(rows, 8)
        torch.testing.assert_close(stitched(x), model(x))
    stitched.save(tmp_path / "artifact")
    loaded = piecework.load(tmp_path / "artifact", model)
    torch.testing.assert_close(loaded(X), model(X), rtol=0, atol=0)


def test_inductor_compiles_each_kind_once() -> None:
    model = Stack(blocks_of(5)).eval()
    stitched = piecework.compile(model, (X,))
    for rows in (4, 2):
        x = torch.randn(rows, 8)
        torch.testing.assert_close(stitched(x), model(x))
    assert (stitched.report().pieces, stitched.report().unique) == (7, 3)
