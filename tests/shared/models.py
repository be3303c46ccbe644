"""What many test files compile: a few splitting operators, layers around them, and compilers that leave pieces as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import nn

import piecework
from piecework.runtime.compilers import CompiledPiece

EAGER = piecework.CompilationConfig(backend="eager")


@piecework.splitting_op("models::mix", mutates_args=("out",))
def mix(value: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(value * 2)


@piecework.splitting_op("models::halve", mutates_args=("out",))
def halve(value: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(value / 2)


@piecework.splitting_op("pairs::mix", mutates_args=("out",), rows="independent")
def mix_pair(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor, layer: str = "") -> None:
    out.copy_(left - 2 * right)


@piecework.splitting_op("models::fresh", rows="independent")
def fresh(x: torch.Tensor) -> torch.Tensor:
    return x * 3


fresh.register_fake(torch.empty_like)


class Told:
    """The compiler ``models:Told``: ``hear`` is told of each compilation, and may give what runs in the piece's place."""

    name: str | None = "told"
    hear: ClassVar[Callable[..., Any]] = staticmethod(lambda graph, inputs, compile_range: None)

    def compute_hash(self, config: piecework.CompilationConfig) -> str:
        return type(self).__name__

    def compile(self, graph, example_inputs, config, compile_range):  # type: ignore[no-untyped-def]
        found = type(self).hear(graph, example_inputs, compile_range)
        return CompiledPiece(found or graph.forward)


class Kept(Told):
    """Keeps a byte of each piece."""

    def to_bytes(self, piece: CompiledPiece) -> bytes:
        return b"."

    def from_bytes(self, data: bytes, graph: torch.fx.GraphModule) -> CompiledPiece:
        return CompiledPiece(graph.forward)


class Block(nn.Module):
    """``op`` between two linear layers; ``last`` are its arguments after the output, ``after`` takes what it writes."""

    def __init__(
        self,
        op: Callable[..., None],
        *last: object,
        inner: int = 8,
        after: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.op, self.last, self.after = op, last, after
        self.enter = nn.Linear(8, 2 * inner)
        self.leave = nn.Linear(inner, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = self.enter(x).chunk(2, -1)
        out = torch.empty_like(left)
        self.op(left, right, out, *self.last)
        return x + self.leave(out if self.after is None else self.after(out))


class Layers(nn.Module):
    """One layer after the other."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x
