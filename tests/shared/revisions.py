"""Revisions of a Llama-like model. In: a number of layers and what is different. Out: the model, and the source that it becomes, before and after each kind of change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

import piecework

WIDTH = 8


@piecework.splitting_op("revisions::attention", mutates_args=("out",))
def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    layer: str,
    scale: float,
) -> None:
    out.copy_(query * key * scale + value)


@piecework.splitting_op("revisions::all_reduce", mutates_args=())
def all_reduce(value: torch.Tensor) -> torch.Tensor:
    return value.clone()


all_reduce.register_fake(torch.empty_like)


@dataclass(frozen=True)
class Layout:
    """One layer: ``place`` is its number in names given to attention; the rest is what revisions change."""

    place: int
    act: Callable[[torch.Tensor], torch.Tensor] = nn.functional.silu
    scale: float = 0.5
    second_norm: bool = True
    residual: bool = False
    scaled: bool = False
    reduced: bool = False
    bias: bool = False
    swapped: bool = False
    renamed: bool = False
    wide: int = 12


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * self.weight


class Attention(nn.Module):
    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.name, self.scale, self.swapped = f"layers.{layout.place}", layout.scale, layout.swapped
        self.q_proj = nn.Linear(WIDTH, WIDTH, bias=layout.bias)
        self.k_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.v_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.o_proj = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor) -> torch.Tensor:
        query, key, value = self.q_proj(x) * cos, self.k_proj(x) * cos, self.v_proj(x)
        if self.swapped:
            query, key = key, query
        out = torch.empty_like(query)
        attention(query, key, value, out, self.name, self.scale)
        return self.o_proj(out)


class MLP(nn.Module):
    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.act = layout.act
        self.gate_proj = nn.Linear(WIDTH, layout.wide, bias=False)
        self.up_proj = nn.Linear(WIDTH, layout.wide, bias=False)
        self.down_proj = nn.Linear(layout.wide, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.reduced, self.residual, self.scaled = layout.reduced, layout.residual, layout.scaled
        self.renamed, self.second_norm = layout.renamed, layout.second_norm
        self.norm = Norm()
        self.self_attn = Attention(layout)
        if layout.second_norm:
            self.mlp_norm = Norm()
        self.add_module("feed_forward" if layout.renamed else "mlp", MLP(layout))

    def forward(self, x: torch.Tensor, cos: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.norm(x), cos)
        if self.reduced:
            x = all_reduce(x)
        inner = self.mlp_norm(x) if self.second_norm else x
        x = x + (self.feed_forward(inner) if self.renamed else self.mlp(inner))
        if self.residual:
            x = x + first
        return x * 2 if self.scaled else x


class Model(nn.Module):
    def __init__(self, layers: list[Layout], last: bool = True, both: bool = False) -> None:
        super().__init__()
        self.both = both
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(Layer(layout) for layout in layers)
        self.norm = Norm() if last else nn.Identity()

    def forward(self, x: torch.Tensor, cos: torch.Tensor):  # type: ignore[no-untyped-def]
        x = first = self.embed(x)
        for layer in self.layers:
            x = layer(x, cos, first)
        return (self.norm(x), x) if self.both else self.norm(x)


def layouts(count: int) -> list[Layout]:
    return [Layout(place) for place in range(count)]


def _at(count: int, **what: object) -> Model:
    """A model whose middle layer is different."""
    each = layouts(count)
    each[count // 2] = replace(each[count // 2], **what)  # type: ignore[arg-type]
    return Model(each)


def _all(count: int, **what: object) -> Model:
    return Model([replace(each, **what) for each in layouts(count)])  # type: ignore[arg-type]


def _without(count: int) -> Model:
    each = layouts(count)
    return Model(
        each[: count // 2] + [replace(e, place=e.place - 1) for e in each[count // 2 + 1 :]]
    )


def _with(count: int) -> Model:
    each, at = layouts(count), count // 2
    return Model(
        [
            *each[:at],
            replace(each[at], wide=20),
            *(replace(e, place=e.place + 1) for e in each[at:]),
        ]
    )


REVISIONS: Mapping[str, Callable[[int], Model]] = {
    "act": lambda n: _at(n, act=nn.functional.gelu),
    "act everywhere": lambda n: _all(n, act=nn.functional.gelu),
    "residual": lambda n: _at(n, residual=True),
    "op added": lambda n: _at(n, scaled=True),
    "op added everywhere": lambda n: _all(n, scaled=True),
    "norm gone": lambda n: _at(n, second_norm=False),
    "layer removed": _without,
    "last layer removed": lambda n: Model(layouts(n - 1)),
    "layer inserted": _with,
    "layer appended": lambda n: Model(layouts(n + 1)),
    "module renamed": lambda n: _all(n, renamed=True),
    "splitting op added": lambda n: _at(n, reduced=True),
    "splitting op added everywhere": lambda n: _all(n, reduced=True),
    "scale changed": lambda n: _at(n, scale=0.25),
    "scale changed everywhere": lambda n: _all(n, scale=0.25),
    "arguments swapped": lambda n: _at(n, swapped=True),
    "bias": lambda n: _at(n, bias=True),
    "width": lambda n: _at(n, wide=16),
    "dtype": lambda n: Model(layouts(n)).to(torch.bfloat16),
    "another result": lambda n: Model(layouts(n), both=True),
    "last norm gone": lambda n: Model(layouts(n), last=False),
    "batch renamed": lambda n: Renamed(layouts(n)),
    "not split": lambda n: Model(layouts(n)),
}


class Renamed(Model):
    def forward(self, tokens: torch.Tensor, cos: torch.Tensor):  # type: ignore[no-untyped-def]
        x = first = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, cos, first)
        return self.norm(x)


def compiled(model: nn.Module, splitting_ops: list[str] | None = None) -> piecework.StitchedModule:
    dtype = next(model.parameters()).dtype
    example = (torch.randn(3, WIDTH, dtype=dtype), torch.randn(3, WIDTH, dtype=dtype))
    return piecework.compile(
        model.eval(),
        example,
        splitting_ops=splitting_ops,
        config={"backend": "eager", "repeated_layers": ["layers"]},
    )


def revision(kind: str, count: int) -> piecework.StitchedModule:
    """The model after the change called ``kind``."""
    some = ["revisions::all_reduce"] if kind == "not split" else None
    return compiled(REVISIONS[kind](count), some)


class Plain(nn.Module):
    """Layers that are no modules: nothing in the source says which layer a piece is of."""

    def __init__(self, layers: list[Layout]) -> None:
        super().__init__()
        self.layers = layers
        self.weights = nn.ParameterList(torch.eye(WIDTH) for _ in range(2 * len(layers)))

    def forward(self, x: torch.Tensor, cos: torch.Tensor) -> torch.Tensor:
        for place, layer in enumerate(self.layers):
            query = torch.nn.functional.linear(x, self.weights[2 * place]) * cos
            out = torch.empty_like(query)
            first, second = (x, query) if layer.swapped else (query, x)
            attention(first, second, x, out, "plain", layer.scale)
            x = x + layer.act(torch.nn.functional.linear(out, self.weights[2 * place + 1]))
            if layer.reduced:
                x = all_reduce(x)
            if layer.scaled:
                x = x * 2
        return x


def plain(kind: str, count: int) -> piecework.StitchedModule:
    """`Plain` after a change; "" for none."""
    each, at = layouts(count), count // 2
    changes: dict[str, list[Layout]] = {
        "": each,
        "act": [*each[:at], replace(each[at], act=nn.functional.gelu), *each[at + 1 :]],
        "op added": [*each[:at], replace(each[at], scaled=True), *each[at + 1 :]],
        "splitting op added": [*each[:at], replace(each[at], reduced=True), *each[at + 1 :]],
        "arguments swapped": [*each[:at], replace(each[at], swapped=True), *each[at + 1 :]],
        "layer inserted": [*each[:at], replace(each[at], scaled=True), *each[at:]],
        "layer removed": each[1:],
        "first layers changed": [replace(layer, scaled=True) for layer in each[:2]] + each[2:],
    }
    return compiled(Plain(changes[kind]))
