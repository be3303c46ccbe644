"""Callables without a name of their own: a partial, a lambda, a nested function, a bound method."""

import functools

import torch
import torch.fx


def build() -> torch.fx.GraphModule:
    def nested(value: torch.Tensor) -> torch.Tensor:
        return value * 3

    double = lambda value: value * 2  # noqa: E731
    half = functools.partial(torch.mul, other=0.5)
    half.__name__ = "half"  # FX wants one to write its own source
    bound = torch.nn.Linear(4, 4).eval().extra_repr
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(nested, (x,))
    y = graph.call_function(double, (y,))
    y = graph.call_function(half, (y,))
    y = graph.call_function(double, (y,))
    text = graph.call_function(bound)
    graph.output((y, text))
    return torch.fx.GraphModule(torch.nn.Module(), graph)


def inputs() -> list[tuple[object, ...]]:
    return [(torch.arange(4.0),)]
