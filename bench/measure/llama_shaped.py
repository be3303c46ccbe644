"""A small decoder to time.

The attention is an operator that stays outside the compiled pieces, registered in two ways; its arithmetic is a stand-in, its arguments are not.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import nn

import piecework

HIDDEN = 64
INTERMEDIATE = 128
VOCABULARY = 128

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int], None]


def attention_body(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor, layer: int
) -> None:
    """One kernel that reads and writes what attention reads and writes."""
    torch.addcmul(value, query, key, out=out)


OPERATOR_NAMES = {
    "custom_op": "piecework_bench::attention_custom",
    "light": "piecework_bench::attention_light",
}


@cache  # torch keeps one registration per name and process
def registered(how: str) -> Attention:
    """The operator as ``torch.library.custom_op`` registers it, or as a light ``Library.define``,
    which is what `piecework.splitting_op` makes."""
    name = OPERATOR_NAMES[how]
    if how == "light":
        light = piecework.splitting_op(name, mutates_args=("out",), rows="independent")
        return light(attention_body)
    made = torch.library.custom_op(name, mutates_args=("out",))(attention_body)
    piecework.declare_rows(name, "independent")
    return made


class RMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(HIDDEN) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class Layer(nn.Module):
    """Nine weights: two norms, q, k, v, o, gate, up, down."""

    def __init__(self, index: int, attention: Attention) -> None:
        super().__init__()
        self.index = index
        self.attention = attention
        self.input_norm = RMSNorm()
        self.q_proj = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.k_proj = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.v_proj = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.o_proj = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.post_norm = RMSNorm()
        self.gate_proj = nn.Linear(HIDDEN, INTERMEDIATE, bias=False)
        self.up_proj = nn.Linear(HIDDEN, INTERMEDIATE, bias=False)
        self.down_proj = nn.Linear(INTERMEDIATE, HIDDEN, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.input_norm(x)
        query, key, value = self.q_proj(normed), self.k_proj(normed), self.v_proj(normed)
        out = torch.empty_like(query)
        self.attention(query, key, value, out, self.index)
        x = x + self.o_proj(out)
        normed = self.post_norm(x)
        gate = nn.functional.silu(self.gate_proj(normed))
        return x + self.down_proj(gate * self.up_proj(normed))


class LlamaShaped(nn.Module):
    """Token ids ``[batch]`` to logits ``[batch, VOCABULARY]``, one token per request."""

    def __init__(self, layers: int, attention: Attention) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList(Layer(index, attention) for index in range(layers))
        self.norm = RMSNorm()
        self.lm_head = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


def build(layers: int, attention: Attention) -> LlamaShaped:
    """The model with seeded weights, for inference."""
    torch.manual_seed(0)
    return LlamaShaped(layers, attention).eval()


def token_ids(batch: int) -> torch.Tensor:
    return torch.arange(batch) % VOCABULARY
