"""A model class that compiles itself: annotate, decorate, call.

Run with ``python -m piecework.examples.decorated``.
"""

import torch

import piecework
from piecework import support_torch_compile
from piecework.runtime import stitched_of


@piecework.splitting_op("examples::pool", mutates_args=("out",))
def pool(hidden: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(hidden.cumsum(0))


@support_torch_compile(mark_unbacked_dims={"x": 0})  # any number of rows, none and one included
class Scorer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter = torch.nn.Linear(16, 32)
        self.leave = torch.nn.Linear(32, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.nn.functional.silu(self.enter(x))
        out = torch.empty_like(hidden)
        pool(hidden, out)
        return self.leave(out)


def main(backend: str = "inductor") -> Scorer:
    config = piecework.CompilationConfig(backend=backend)
    model = Scorer(compilation_config=config)  # __init__ need not know the keyword
    with torch.no_grad():
        for rows in (5, 1, 0, 9):  # compiled at the first call, served by one graph
            x = torch.randn(rows, 16)
            torch.testing.assert_close(model(x), model.forward(x))
    stitched = stitched_of(model)
    assert stitched is not None
    print(stitched.source.code, stitched.report(), sep="\n")
    return model


if __name__ == "__main__":
    main()
