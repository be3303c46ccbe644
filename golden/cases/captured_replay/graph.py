"""Captured, with static graphs: two cut operators in a row, out-buffers and fresh tensors, an alias of memory, a passed-through input; replayed as one graph, and with copies and without."""

import piecework
import torch
from torch import nn

TEXT_MADE_WITH = {"torch": "2.13"}


@piecework.splitting_op("replay_golden::mix", mutates_args=("out",), rows="independent")
def mix(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor, layer: str) -> None:
    out.copy_(left - 2 * right)


@piecework.splitting_op("replay_golden::fresh", rows="independent")
def fresh(x: torch.Tensor) -> torch.Tensor:
    return x * 3


@fresh.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


class Block(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.enter, self.leave = nn.Linear(8, 16), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = self.enter(x).chunk(2, -1)
        out = torch.empty_like(left)
        mix(left, right, out, self.name)
        return x + self.leave(fresh(out))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(f"layers.{index}") for index in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def stitched() -> piecework.StitchedModule:
    torch.manual_seed(0)
    model = Stack().requires_grad_(False)
    config = piecework.CompilationConfig(backend="eager")
    return piecework.compile(model, (torch.randn(4, 8),), config=config)


def texts(module: piecework.StitchedModule) -> dict[str, object]:
    """The replay of one size as one graph, and of its pieces under both address policies; calls after this are served by the last."""
    module.capture([8], progress=False, estimate=False, poison=True, mode="FULL")
    sources = {"replay_full": module.static_graphs.source_for(8)}
    for policy in ("eager", "copy"):
        module.capture([8], progress=False, estimate=False, poison=True, address_policy=policy)
        sources[f"replay_{policy}"] = module.static_graphs.source_for(8)
    return sources


def inputs() -> list[tuple[object, ...]]:
    torch.manual_seed(1)
    return [(torch.randn(rows, 8),) for rows in (8, 5, 9)]
