"""What the tests on a GPU compile. In: a device. Out: small models with a splitting operator between their pieces, and a small Llama.

``PIECEWORK_TEST_DEVICE=cpu`` runs those tests on the CPU's static graphs, as a rehearsal; what only CUDA has is skipped there.
"""

from __future__ import annotations

import os

import pytest
import torch
from small_llms import build
from torch import nn

import piecework
from piecework.runtime.batch.forward_context import current_forward_context

DEVICE = os.environ.get("PIECEWORK_TEST_DEVICE", "cuda")
ON_CUDA = DEVICE == "cuda"
needs_device = pytest.mark.skipif(
    ON_CUDA and not torch.cuda.is_available(), reason="needs a CUDA device"
)
needs_cuda = pytest.mark.skipif(
    not (ON_CUDA and torch.cuda.is_available()), reason="needs a CUDA device"
)
INDUCTOR = piecework.CompilationConfig()
EAGER = piecework.CompilationConfig(backend="eager")
HIDDEN = 64


class Told:
    """What the operator below does besides its work, while something is captured."""

    fails_at = 0


@piecework.splitting_op("gpu_tests::mix", mutates_args=("out",), rows="independent")
def mix(x: torch.Tensor, out: torch.Tensor) -> None:
    if x.shape[0] == Told.fails_at and ON_CUDA and torch.cuda.is_current_stream_capturing():
        x.sum().item()
    context = current_forward_context()
    scale = None if context is None else context.attn_metadata
    torch.mul(x, 2 if scale is None else scale, out=out)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = nn.functional.silu(self.enter(x))
        out = torch.empty_like(inner)
        mix(inner, out)
        return x + self.leave(out)


class Decoder(nn.Module):
    """Token ids and positions ``[batch]`` to logits ``[batch, vocabulary]``."""

    def __init__(self, layers: int = 3, vocabulary: int = 97) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(vocabulary, HIDDEN), nn.Embedding(128, HIDDEN)
        self.layers = nn.ModuleList(Block() for _ in range(layers))
        self.head = nn.Linear(HIDDEN, vocabulary)

    def forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids) + self.places(positions)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Unsigned(nn.Module):
    """Takes and returns what a GPU copies only one by one, beside what it copies together."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        z = x.to(torch.float32) + y.to(torch.float32)
        return z, z + 1, (z > 3).to(torch.uint32), (z > 4).to(torch.uint32)


def decoder(layers: int = 3) -> Decoder:
    torch.manual_seed(0)
    return Decoder(layers).to(DEVICE).requires_grad_(False).eval()


def batch_of(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, 97, (size,), device=DEVICE)
    return ids, torch.arange(size, device=DEVICE) % 128


def stitched_decoder(
    config: piecework.CompilationConfig, layers: int = 3
) -> tuple[Decoder, piecework.StitchedModule]:
    model = decoder(layers)
    return model, piecework.compile(model, batch_of(8), config=config)


def assert_alike(stitched: piecework.StitchedModule, model: nn.Module, sizes) -> None:  # type: ignore[no-untyped-def]
    """Every size equals the model as it is, twice, with other data each time."""
    with torch.no_grad():
        for size in sizes:
            for _ in range(2):
                given = batch_of(size)
                torch.testing.assert_close(stitched(*given), model(*given), rtol=1e-3, atol=1e-3)


def small_llama(dtype: torch.dtype):  # type: ignore[no-untyped-def]
    pytest.importorskip("transformers")
    sizes = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256}
    model = build(scale=0.02, norms=1.0, max_position_embeddings=128, **sizes)
    return model.to(DEVICE, dtype)


@piecework.splitting_op("gpu_tests::remember", mutates_args=("cache", "out"))
def remember(x: torch.Tensor, cache: torch.Tensor, out: torch.Tensor) -> None:
    cache[0].add_(x.sum(0))
    torch.add(x, cache.sum(0), out=out)
