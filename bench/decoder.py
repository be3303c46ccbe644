"""A decoder to compile and to capture.

Attention is one launch that reads and writes what attention reads and writes; what is measured is how captured pieces are put
together, not how fast they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

import piecework

OPERATOR = "piecework_bench::decoder_attention"


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """Sizes of a decoder; ``EIGHT_B`` has those of an 8B Llama."""

    hidden: int
    intermediate: int
    key_value: int
    vocabulary: int
    dtype: torch.dtype


SMALL = DecoderShape(64, 128, 64, 128, torch.float32)
EIGHT_B = DecoderShape(4096, 14336, 1024, 32000, torch.bfloat16)
TINY = DecoderShape(16, 32, 8, 16, torch.float32)


def attention_body(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor, layer: int
) -> None:
    """One kernel; keys and values are narrower, so only their first column takes part."""
    torch.addcmul(query, key[:, :1], value[:, :1], out=out)


@cache  # torch keeps one registration per name and process
def attention() -> Callable[..., None]:
    return piecework.splitting_op(OPERATOR, mutates_args=("out",), rows="independent")(
        attention_body
    )


class Layer(nn.Module):
    def __init__(self, index: int, shape: DecoderShape) -> None:
        super().__init__()
        self.index, self.shape, self.attention = index, shape, attention()
        wide = shape.hidden + 2 * shape.key_value
        self.input_norm, self.post_norm = nn.RMSNorm(shape.hidden), nn.RMSNorm(shape.hidden)
        self.qkv_proj = nn.Linear(shape.hidden, wide, bias=False)
        self.o_proj = nn.Linear(shape.hidden, shape.hidden, bias=False)
        self.gate_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.down_proj = nn.Linear(shape.intermediate, shape.hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        sizes = [self.shape.hidden, self.shape.key_value, self.shape.key_value]
        query, key, value = self.qkv_proj(self.input_norm(x)).split(sizes, dim=-1)
        out = torch.empty_like(x)
        self.attention(query, key, value, out, self.index)
        x = x + self.o_proj(out)
        y = self.post_norm(x)
        return x + self.down_proj(nn.functional.silu(self.gate_proj(y)) * self.up_proj(y))


class Decoder(nn.Module):
    """Token ids ``[batch]`` to logits ``[batch, vocabulary]``, one token per request."""

    def __init__(self, layers: int, shape: DecoderShape) -> None:
        super().__init__()
        self.embed = nn.Embedding(shape.vocabulary, shape.hidden)
        self.layers = nn.ModuleList(Layer(index, shape) for index in range(layers))
        self.norm = nn.RMSNorm(shape.hidden)
        self.lm_head = nn.Linear(shape.hidden, shape.vocabulary, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


def build(layers: int, shape: DecoderShape, device: str) -> Decoder:
    """The model with seeded weights, made on the device, for inference."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(shape.dtype)
    try:
        with torch.device(device):
            return Decoder(layers, shape).requires_grad_(False).eval()
    finally:
        torch.set_default_dtype(before)


def token_ids(batch: int, shape: DecoderShape, device: str) -> torch.Tensor:
    return torch.arange(batch, device=device) % shape.vocabulary
