"""Three layers cut at attention, an operator that fills a buffer: each call is written where it happens."""

import torch
import torch.fx
from piecework.codegen import LowerOptions, split_graph
from torch.fx.passes.fake_tensor_prop import FakeTensorProp


def _attention(q: torch.Tensor, k: torch.Tensor, out: torch.Tensor, layer: str) -> None:
    out.copy_(torch.softmax(q @ k.t(), dim=-1) @ k)


if not hasattr(torch.ops, "golden_split_attention") or not hasattr(
    torch.ops.golden_split_attention, "attention"
):
    torch.library.define(
        "golden_split_attention::attention", "(Tensor q, Tensor k, Tensor(a!) out, str layer) -> ()"
    )
    torch.library.impl("golden_split_attention::attention", "CPU", _attention)
    torch.library.register_fake("golden_split_attention::attention", lambda q, k, out, layer: None)


def build() -> torch.fx.GraphModule:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    weights = [graph.placeholder(f"weight_{number}") for number in range(3)]
    for number, weight in enumerate(weights):
        q = graph.call_function(torch.nn.functional.linear, (x, weight))
        k = graph.call_function(torch.mul, (x, 2))
        out = graph.call_function(torch.empty_like, (q,))
        graph.call_function(
            torch.ops.golden_split_attention.attention.default, (q, k, out, f"layers.{number}")
        )
        x = graph.call_function(torch.add, (x, out))
    graph.output((x,))
    gm = torch.fx.GraphModule(torch.nn.Module(), graph)
    FakeTensorProp(gm).propagate(torch.empty(2, 4), *(torch.empty(4, 4) for _ in range(3)))
    return split_graph(gm, ["golden_split_attention::attention"])[0]


def options() -> LowerOptions:
    return LowerOptions(
        submods=[f"submod_{number}" for number in (0, 2, 4, 6)],
        bound={f"weight_{number}": f"layers.{number}.weight" for number in (0, 2)},
        banner=("model: three layers", "7 submodules, cut at golden_split_attention::attention"),
    )


def inputs() -> list[tuple[object, ...]]:
    torch.manual_seed(0)
    return [(torch.randn(rows, 4), *(torch.randn(4, 4) for _ in range(3))) for rows in (1, 3)]
