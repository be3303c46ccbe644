"""Functions of `operator` that have a sign, the ones that have none, and literals on either side."""

import operator

import torch
import torch.fx

SIGNS = (
    operator.add,
    operator.sub,
    operator.mul,
    operator.truediv,
    operator.floordiv,
    operator.mod,
    operator.pow,
    operator.eq,
    operator.ne,
    operator.lt,
    operator.le,
    operator.gt,
    operator.ge,
)


def build() -> torch.fx.GraphModule:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    n = graph.placeholder("n")
    results = [graph.call_function(sign, (x, n)) for sign in SIGNS]
    for sign in (operator.and_, operator.or_, operator.xor, operator.lshift, operator.rshift):
        results.append(graph.call_function(sign, (n, 3)))
    results.append(graph.call_function(operator.sub, (-1, n)))
    results.append(graph.call_function(operator.pow, (-2, n)))
    results.append(graph.call_function(operator.matmul, (x, x)))
    for prefix in (operator.neg, operator.pos, operator.invert, operator.not_):
        results.append(graph.call_function(prefix, (n,)))
    results.append(graph.call_function(operator.neg, (-7,)))
    results.append(graph.call_function(operator.add, (1, 2j)))
    results.append(graph.call_function(operator.contains, ([1, 2, n], 2)))
    results.append(graph.call_function(operator.index, (n,)))
    graph.output(tuple(results))
    return torch.fx.GraphModule(torch.nn.Module(), graph)


def inputs() -> list[tuple[object, ...]]:
    torch.manual_seed(0)
    return [(torch.randn(3, 3), 2), (torch.randn(3, 3), 5)]
