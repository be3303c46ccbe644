"""Captured: a plain module with two layers and a splitting op of its own; any number of rows, one size fixed by the model."""

import piecework
import torch

TEXT_MADE_WITH = {"torch": "2.13"}


@piecework.splitting_op("golden_captured_module::attention", mutates_args=("out",))
def attention(query: torch.Tensor, key: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(torch.softmax(query @ key.mT, dim=-1) @ key)


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = torch.nn.Linear(8, 16)
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key = self.project(x).chunk(2, dim=-1)
        out = torch.empty_like(query)
        attention(query * self.scale, key, out)
        return torch.nn.functional.gelu(x + out)


class TwoLayers(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([Layer(), Layer()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x[: x.shape[0] - 1]


def stitched() -> piecework.StitchedModule:
    torch.manual_seed(0)
    return piecework.compile(
        TwoLayers().eval(),
        (torch.zeros(4, 8),),
        splitting_ops=["golden_captured_module::attention"],
        config=piecework.CompilationConfig(backend="eager"),
    )


def inputs() -> list[tuple[object, ...]]:
    torch.manual_seed(1)
    return [(torch.randn(rows, 8),) for rows in (2, 5)]
