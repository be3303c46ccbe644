"""How a stitched graph depends on its batch size. In: a capture and its backend. Out: which inputs are staged along which dimension, which are frozen, and how outputs are trimmed.

It refuses what a captured graph can't serve at another size than its own; it runs nothing.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.fx

from piecework.codegen.origin import value_of
from piecework.errors import ConfigError, StaticGraphError
from piecework.runtime import torch_compat
from piecework.runtime.backend import PieceworkBackend
from piecework.runtime.capture import Argument, Capture, Size, Weight
from piecework.runtime.mutation import held_by_source, mutations_in, refuse_mutations


@dataclass(frozen=True, slots=True)
class StagedInput:
    """A tensor argument; ``dim`` is its batch dimension, None if its shape is fixed."""

    position: int
    name: str
    fake: torch.Tensor
    dim: int | None


@dataclass(frozen=True, slots=True)
class BatchShape:
    """Arguments of ``execution_fn`` and its results, as far as the batch size matters.

    Attributes:
        names: its parameters, in order.
        staged: tensor arguments.
        sizes: positions of arguments that are the batch size.
        weights: position → path, for weights that are passed per call.
        output_dims: the batch dimension of each result; None for one that is no tensor.
        low, high: batch sizes that the trace allows; None where there is no bound.
        guards: further conditions on the batch size, as Python text over ``symbol``.
        symbol: what they call it.
    """

    names: tuple[str, ...]
    staged: tuple[StagedInput, ...]
    sizes: tuple[int, ...]
    weights: Mapping[int, str]
    output_dims: tuple[int | None, ...]
    low: int
    high: int | None
    guards: tuple[str, ...]
    symbol: str

    @property
    def dynamic(self) -> tuple[StagedInput, ...]:
        return tuple(each for each in self.staged if each.dim is not None)

    def refusal(self, size: int) -> str | None:
        """Why no batch of ``size`` is served, or None."""
        if size < self.low or (self.high is not None and size > self.high):
            most = "" if self.high is None else f" to {self.high}"
            return f"the trace allows sizes from {self.low}{most}"
        for guard in self.guards:
            if not eval(guard, {"__builtins__": {}, **_GUARD_NAMES}, {self.symbol: size}):
                return f"the trace requires {guard}"
        return None


_GUARD_NAMES = {
    "math": math, "operator": operator, "min": min, "max": max, "int": int, "float": float, "abs": abs
}  # fmt: skip


def batch_shape(captured: Capture, backend: PieceworkBackend) -> BatchShape:
    """Read ``captured`` for capturing static graphs.

    Raises:
        StaticGraphError: something writes to an argument or, inside a piece, to a weight; a second dimension is dynamic;
            or a result has no batch dimension, so that padding would reach it.
    """
    source, split_gm, symbol = backend.source, backend.split_gm, backend.batch_symbol
    assert source is not None and split_gm is not None
    if symbol is None:
        raise StaticGraphError(
            "no input has a dynamic batch dimension, so there is nothing to capture sizes of",
            where="capture",
            hint="mark the batch dimension with torch._dynamo.mark_dynamic",
        )
    _refuse_writes(captured, backend)
    bound = {row.path for row in source.module.bound}
    names = tuple(parameter.name for parameter in source.module.entry.parameters)
    nodes = split_gm.graph.find_nodes(op="placeholder")
    passed = [
        (each, node)
        for each, node in zip(captured.inputs, nodes, strict=True)
        if not (isinstance(each, Weight) and each.path in bound)
    ]
    staged, sizes, weights = [], [], {}
    for position, (each, node) in enumerate(passed):
        fake = value_of(node)
        if isinstance(each, Weight):
            weights[position] = each.path
        elif isinstance(fake, torch.Tensor):
            staged.append(
                StagedInput(position, names[position], fake, _batch_dim(each, fake, symbol))
            )
        elif torch_compat.symbol_of(fake) == symbol:
            sizes.append(position)
        elif torch_compat.symbols_of(fake):
            raise _second_dimension(names[position], each)
        else:
            raise StaticGraphError(
                "is a number that is passed per call, which a captured graph freezes",
                where=f"input {names[position]}",
                hint="make it a constant of the model, or a tensor",
            )
    found = [s for s in captured.assumptions.symbols() if _is_batch(captured, backend, s.name)]
    limits = found[0] if found else None
    return BatchShape(
        names,
        tuple(staged),
        tuple(sizes),
        weights,
        _output_dims(split_gm, symbol),
        max(1, (limits.low if limits is not None else None) or 1),
        None if limits is None else limits.high,
        captured.assumptions.guards(),
        limits.name if limits is not None else "",
    )


def _is_batch(captured: Capture, backend: PieceworkBackend, name: str) -> bool:
    assert backend.batch_input is not None
    index, dim = backend.batch_input
    each = captured.inputs[index]
    if isinstance(each, Argument):
        return getattr(captured.assumptions.passed(each.leaf, dim), "name", None) == name
    if isinstance(each, Size):
        return getattr(captured.assumptions.passed(each.leaf, each.dim), "name", None) == name
    return False


def _batch_dim(each: Argument | Size, fake: torch.Tensor, symbol: str) -> int | None:
    found = []
    for dim, size in enumerate(fake.shape):
        if torch_compat.symbol_of(size) == symbol:
            found.append(dim)
        elif torch_compat.symbols_of(size):
            raise _second_dimension(f"{each.name}, dimension {dim}", each)
    if len(found) > 1:
        raise StaticGraphError(
            f"has the batch size in dimensions {found}; one can be padded",
            where=f"input {each.name}",
            hint="compute the larger tensor inside a splitting op",
        )
    if not torch_compat.is_traced_contiguous(fake):
        raise StaticGraphError(
            "was traced with other strides than a contiguous tensor's, and its static buffer is contiguous",
            where=f"input {each.name}",
            hint="trace with contiguous example arguments",
        )
    return found[0] if found else None


def _second_dimension(where: str, each: Argument | Size) -> StaticGraphError:
    return StaticGraphError(
        "is dynamic beside the batch size, and a captured graph fixes it",
        where=f"input {where}",
        hint="mark only the batch dimension with torch._dynamo.mark_dynamic, or the other with mark_static",
    )


def _output_dims(split_gm: torch.fx.GraphModule, symbol: str) -> tuple[int | None, ...]:
    returned = split_gm.graph.output_node().args[0]
    outputs = returned if isinstance(returned, (list, tuple)) else [returned]
    dims: list[int | None] = []
    for index, node in enumerate(outputs):
        value = value_of(node) if isinstance(node, torch.fx.Node) else node
        if value is None:
            dims.append(None)
            continue
        shape: Sequence[object] = tuple(value.shape) if isinstance(value, torch.Tensor) else ()
        found = [dim for dim, size in enumerate(shape) if torch_compat.symbol_of(size) == symbol]
        other = [size for size in shape if torch_compat.symbols_of(size)]
        if len(found) != 1 or len(other) != 1:
            what = f"has shape {list(map(str, shape))}" if shape else "is a scalar or a number"
            raise StaticGraphError(
                f"{what}, which can't be trimmed from a padded batch to its own size",
                where=f"result {index}",
                hint="return tensors with the batch size in exactly one dimension",
            )
        dims.append(found[0])
    return tuple(dims)


def _refuse_writes(captured: Capture, backend: PieceworkBackend) -> None:
    split_gm, source = backend.split_gm, backend.source
    assert split_gm is not None and source is not None and backend.graph is not None
    nodes = split_gm.graph.find_nodes(op="placeholder")
    pairs = list(zip(nodes, captured.inputs, strict=True))
    held = {node.name: each.path for node, each in pairs if isinstance(each, Weight)}
    refuse_mutations(mutations_in(split_gm, source.submod_names, held or held_by_source(split_gm)))
    arguments = {node.name: each.name for node, each in pairs if isinstance(each, Argument)}
    every = [item.submod_name for item in backend.piecewise_graphs]
    for write in mutations_in(split_gm, every, arguments):
        raise StaticGraphError(
            f"{write.op} writes to argument {write.path}, of which captured graphs see a copy",
            where=write.where or write.piece,
            hint="keep what is written in a buffer of the model or in the forward context",
        )


def require_sizes(shape: BatchShape, sizes: Sequence[int]) -> None:
    """Check that every size can be captured.

    Raises:
        ConfigError: one can't; the message says why.
    """
    for size in sizes:
        why = shape.refusal(size)
        if why is not None:
            raise ConfigError(f"size {size} can't be captured: {why}", where="capture sizes")
