"""A small model compiled through the cache, in a process of its own: configuration in, JSON out."""

import json
import sys

import torch

import piecework


@piecework.splitting_op("piece_cache::mix", mutates_args=("out",))
def mix(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor, layer: str) -> None:
    out.copy_(left - right)


class Block(torch.nn.Module):
    def __init__(self, index: int, width: int) -> None:
        super().__init__()
        self.index = index
        self.enter, self.leave = torch.nn.Linear(width, 2 * width), torch.nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = self.enter(x).chunk(2, -1)
        out = torch.empty_like(left)
        mix(left, right, out, f"layers.{self.index}")
        return x + self.leave(out)


def compile_and_compare(width: int, **fields: object) -> dict[str, object]:
    """Compile the model of this width and compare it with eager, on a batch size that it was not traced with."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(Block(i, width) for i in range(4)))
    config = piecework.CompilationConfig(**fields)
    stitched = piecework.compile(model, (torch.randn(5, width),), config=config)
    x = torch.randn(3, width)
    with torch.no_grad():
        error = (stitched(x) - model(x)).abs().max().item()
    return {**piecework.counters.snapshot(), "error": error, "code": stitched.source.code}


if __name__ == "__main__":
    print(json.dumps(compile_and_compare(8, **json.loads(sys.argv[1]))))
