"""The shape guards of a trace, evaluated per call: a debugging aid that fails where Dynamo would have traced again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.fx
from torch.utils import _pytree as pytree

from piecework.codegen.graph.origin import value_of
from piecework.errors import InputError
from piecework.runtime import torch_compat
from piecework.runtime.trace.inputs import Argument, GraphInput


class ShapeGuards:
    """What the trace recorded of the sizes that it saw, kept to be evaluated.

    Guards on sizes that only the data decides are part of the graph and are not evaluated here.

    Args:
        graph: the captured graph; its fake values carry the guards.
        inputs: where its placeholders come from.
    """

    def __init__(self, graph: torch.fx.GraphModule, inputs: Sequence[GraphInput]) -> None:
        placeholders = graph.graph.find_nodes(op="placeholder")
        self._fakes = {
            source.leaf: (source.name, value_of(node))
            for node, source in zip(placeholders, inputs, strict=True)
            if isinstance(source, Argument)
        }
        sizes = [size for _, fake in self._fakes.values() for size in _sizes(fake)]
        self._guards = torch_compat.recorded_guards(sizes)

    @property
    def texts(self) -> tuple[str, ...]:
        """The recorded guards and ranges, as expressions over torch's symbols."""
        return tuple(text for text, _, _ in self._guards)

    def check(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> None:
        """Evaluate every guard for the sizes of these arguments.

        Raises:
            InputError: one does not hold; names it, where the trace recorded it, and the sizes.
        """
        leaves = pytree.tree_leaves((args, dict(kwargs)))
        values: dict[str, int] = {}
        for leaf, (_, fake) in self._fakes.items():
            for traced, actual in zip(_sizes(fake), _sizes(leaves[leaf]), strict=False):
                symbol = torch_compat.symbol_of(traced)
                if symbol is not None and isinstance(actual, int):
                    values.setdefault(symbol, actual)
        for leaf, (name, fake) in self._fakes.items():
            self._check_sizes(name, fake, leaves[leaf], values)
        for text, origin, holds in self._guards:
            if holds(values) is False:
                shown = ", ".join(f"{symbol} = {value}" for symbol, value in values.items())
                raise InputError(
                    f"the trace assumed {text}, and {shown}",
                    where=origin or "a range that the trace recorded",
                    hint="compile the model again for such sizes, or declare the dimension unbacked",
                )

    def _check_sizes(self, name: str, fake: object, now: object, values: Mapping[str, int]) -> None:
        for dim, (traced, actual) in enumerate(zip(_sizes(fake), _sizes(now), strict=False)):
            expected = torch_compat.size_value(traced, values)
            if expected is not None and expected != actual:
                raise InputError(
                    f"the trace assumed size {traced} in dimension {dim} of {name}, which is {expected} "
                    f"for the other arguments, and it is {actual}",
                    hint="compile the model again for such sizes",
                )


def _sizes(value: object) -> tuple[object, ...]:
    if isinstance(value, torch.Tensor):
        return tuple(value.shape)
    return (value,) if isinstance(value, (int, torch.SymInt)) else ()
