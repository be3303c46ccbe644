"""A trace that layers share, beside a trace of every layer. In: a model and a call. Out: both, compared node by node: operators, literals, operands, fake values, places in the model and in its source."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.fx
from torch.utils import _pytree as pytree

from piecework.codegen.graph.origin import module_path, source_line, value_of
from piecework.runtime.torch_compat import storage_id
from piecework.runtime.trace.one_trace import Capture
from piecework.runtime.trace.shared import RepeatedLayers
from piecework.runtime.trace.sizes.example_sizes import SizePolicy
from piecework.runtime.trace.tracing import capture

Wish = str | tuple[str, ...]


def traced(
    model: Callable[..., object],
    args: Sequence[object],
    kwargs: Mapping[str, object],
    wish: Wish,
    sizes: SizePolicy | None = None,
) -> tuple[Capture, RepeatedLayers]:
    layers = RepeatedLayers(wish)
    found = capture(model, args, kwargs, lambda *_: None, sizes=sizes, repeated=layers)
    return found, layers


def form(capture: Capture) -> list[object]:
    """What a graph is but for its nodes' names and the order of its inputs."""
    nodes = list(capture.graph.graph.nodes)
    inputs = [n for n in nodes if n.op == "placeholder"]
    known = {node: repr(_input(s)) for node, s in zip(inputs, capture.inputs, strict=True)}
    known |= {node: str(i) for i, node in enumerate(n for n in nodes if n.op != "placeholder")}
    memory: dict[int, str] = {}

    def value(each: object) -> object:
        if isinstance(each, torch.Tensor):
            where = memory.setdefault(storage_id(each), f"memory {len(memory)}")
            sizes = str((tuple(each.shape), each.stride(), each.storage_offset()))
            return each.dtype, each.device, sizes, each.requires_grad, where
        return repr(each)

    def operand(each: object) -> object:
        return f"%{known[each]}" if isinstance(each, torch.fx.Node) else (type(each), repr(each))

    found: list[object] = []
    for node in sorted(inputs, key=known.__getitem__):
        found.append((known[node], value(value_of(node))))
    for node in (n for n in nodes if n.op != "placeholder"):
        given = pytree.tree_map(operand, (node.args, dict(node.kwargs)))
        made = pytree.tree_map(value, value_of(node))
        # What torch asserts of a size stands where an input is first looked at.
        is_check = isinstance(value_of(node), torch.SymBool) or "_assert" in str(node.target)
        where = () if is_check else (module_path(node), source_line(node))
        found.append((node.op, str(node.target), given, made, *where))
    return found


def _input(source: object) -> tuple[object, ...]:
    return type(source).__name__, getattr(source, "path", None) or source.name  # type: ignore[attr-defined]


def require_one_graph(
    model: Callable[..., object],
    args: Sequence[object] = (),
    kwargs: Mapping[str, object] | None = None,
    wish: Wish = "found",
    sizes: Callable[[], SizePolicy] | None = None,
) -> str:
    """Assert that the graph is the flat trace's; returns what the report says of the layers."""
    policies = [None if sizes is None else sizes() for _ in range(2)]
    flat, _ = traced(model, args, kwargs or {}, "off", policies[0])
    shared, layers = traced(model, args, kwargs or {}, wish, policies[1])
    for one, other in zip(form(flat), form(shared), strict=True):
        assert one == other
    return layers.text()
