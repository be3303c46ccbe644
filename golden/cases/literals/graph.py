"""Every literal that may be written inline, and those beside them that may not."""

import math

import torch
import torch.fx


def collect(*args: object, **kwargs: object) -> tuple[object, ...]:
    return (args, tuple(kwargs.items()))


def build() -> torch.fx.GraphModule:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    inline = (
        0, -1, 2**70, True, False, None, ..., 0.0, -0.0, 1e-300, -2.5, 1j, 2 - 3j, "", "it's",
        'say "hi"', "tab\tnew\nline\\", "\u00e9\u4e2d\ud800", b"\x00raw'", (), (1,), (1, (2, [3])),
        [], [x, {"k": x, 1: None}], {}, slice(None, 3, -1),
    )  # fmt: skip
    beside = (math.inf, -math.inf, math.nan, complex(-0.0, 1.0), torch.float16, torch.strided)
    first = graph.call_function(len, ([x, *inline],))
    second = graph.call_method("new_tensor", (x, [1.0, -0.0]), {"dtype": torch.float64})
    third = graph.call_function(collect, inline, {"beside": beside, "more": 10**2000})
    graph.output((first, second, third))
    return torch.fx.GraphModule(torch.nn.Module(), graph)


def inputs() -> list[tuple[object, ...]]:
    return [(torch.ones(2),)]
