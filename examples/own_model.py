"""A model of your own with a splitting op of your own: compile it, read it, run it.

Run with ``python -m piecework.examples.own_model``.
"""

import torch

import piecework


@piecework.splitting_op("examples::attention", mutates_args=("out",))
def attention(query: torch.Tensor, key: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(torch.softmax(query @ key.mT, dim=-1) @ key)


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = torch.nn.Linear(32, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key = self.project(x).chunk(2, dim=-1)
        out = torch.empty_like(query)
        attention(query, key, out)
        return torch.nn.functional.gelu(x + out)


def main(backend: str = "inductor") -> piecework.StitchedModule:
    model = torch.nn.Sequential(*(Block() for _ in range(4)))
    config = piecework.CompilationConfig(backend=backend)
    stitched = piecework.compile(model, (torch.randn(6, 32),), config=config)
    print(stitched.source.code, stitched.report(), sep="\n")
    x = torch.randn(9, 32)  # another batch size, the same graph
    torch.testing.assert_close(stitched(x), model(x).detach())
    return stitched


if __name__ == "__main__":
    main()
