"""A compiler of one's own. In: the pieces of a small model. Out: each as another compiler made it, with its calls counted and timed.

Run it with ``python -m piecework.examples.own_compiler``; the name of the inner compiler may follow.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.fx
from torch import nn

import piecework
from piecework.runtime import Range
from piecework.runtime.compilers import CompiledPiece, make_compiler


@dataclass
class Calls:
    """What one compiled piece did: how often it ran and how long that took."""

    nodes: int
    batches: str
    count: int = 0
    seconds: float = 0.0


class TimedCompiler:
    """Lets ``inner`` compile each piece and wraps the result; three names are all that a compiler needs."""

    name = "timed"
    inner = "eager"
    pieces: list[Calls] = []  # noqa: RUF012 - the example's result, read by main

    def compute_hash(self, config: piecework.CompilationConfig) -> str:
        """Everything that changes the code: the inner compiler, and this one's version."""
        inner = config.replace(backend=self.inner)
        return f"timed 1 {make_compiler(inner).compute_hash(inner)}"

    def compile(
        self,
        graph: torch.fx.GraphModule,
        example_inputs: Sequence[object],
        config: piecework.CompilationConfig,
        compile_range: Range | None,
    ) -> CompiledPiece:
        """Compile one piece for one range of batch sizes."""
        inner = config.replace(backend=self.inner)
        compiled = make_compiler(inner).compile(graph, example_inputs, inner, compile_range)
        calls = Calls(len(graph.graph.nodes), str(compile_range or "all"))
        self.pieces.append(calls)

        def run(*args: object) -> object:
            start = time.perf_counter()
            result = compiled.runnable(*args)
            calls.count += 1
            calls.seconds += time.perf_counter() - start
            return result

        return CompiledPiece(run)


@piecework.splitting_op("own_compiler::scale", mutates_args=("out",), rows="independent")
def scale(x: torch.Tensor, out: torch.Tensor) -> None:
    """What is cut at; it stays outside the compiled pieces."""
    out.copy_(x * 2)


class Layer(nn.Module):
    """A linear layer with the splitting op behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.linear(x))
        out = torch.empty_like(y)
        scale(y, out)
        return out + x


def main(inner: str = "eager") -> list[Calls]:
    """Compile four layers with the compiler above, run them, and print what each different piece did."""
    TimedCompiler.inner = inner
    TimedCompiler.pieces.clear()
    config = piecework.CompilationConfig(
        backend=f"{__name__}:TimedCompiler", compile_ranges_endpoints=[16]
    )
    model = nn.Sequential(*(Layer() for _ in range(4)))
    stitched = piecework.compile(model, (torch.randn(4, 8),), config=config)
    for batch in (4, 5, 64):
        x = torch.randn(batch, 8)
        with torch.no_grad():
            torch.testing.assert_close(stitched(x), model(x))
    for calls in TimedCompiler.pieces:
        print(
            f"batches {calls.batches}, {calls.nodes} nodes: "
            f"{calls.count} calls, {calls.seconds * 1e6:.0f} µs"
        )
    return TimedCompiler.pieces


if __name__ == "__main__":
    main(*sys.argv[1:2])
