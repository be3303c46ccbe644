"""How a stitched graph depends on its batch size: what is staged, frozen, trimmed and served."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.fx

from piecework.codegen.entry.checks import range_text
from piecework.codegen.plan.size_text import evaluate, symbols_in


@dataclass(frozen=True, slots=True)
class StagedInput:
    """A tensor argument.

    Attributes:
        position: among the parameters of ``execution_fn``.
        name: its parameter's name.
        fake: what it was traced as.
        dim: its batch dimension; None if it has none.
        others: its dimensions with another symbol, each with that symbol's label.
        written: the graph writes to it.
    """

    position: int
    name: str
    fake: torch.Tensor
    dim: int | None
    others: Mapping[int, str]
    written: bool = False

    def sizes(self, count: int, others: Mapping[str, int]) -> list[int]:
        """Its shape in a batch of ``count`` with these other sizes."""
        known = {self.dim: count, **{dim: others[label] for dim, label in self.others.items()}}
        return [known[d] if d in known else int(n) for d, n in enumerate(self.fake.shape)]


@dataclass(frozen=True, slots=True)
class OtherSize:
    """A dynamic size, or an integer argument, beside the batch size; a captured graph fixes it.

    Attributes:
        label: ``x.1`` is dimension 1 of argument ``x``, ``n`` an integer argument.
        labels: all its names, where several dimensions are equal.
        symbol: what guards call it.
        position, dim: where a call has it; ``dim`` is None for a number.
        low, high: values that the trace allows; None where there is no bound.
        example: what the example had, captured if nothing else is asked for; None if unknown.
    """

    label: str
    labels: tuple[str, ...]
    symbol: str
    position: int
    dim: int | None
    low: int | None = None
    high: int | None = None
    example: int | None = None

    def of(self, flat: Sequence[object]) -> int:
        """Its value in a call."""
        value = flat[self.position]
        return value if self.dim is None else value.shape[self.dim]  # type: ignore[return-value, attr-defined]


@dataclass(frozen=True, slots=True)
class ResultRule:
    """How one result of a padded replay becomes the result of the batch.

    Attributes:
        dims: dimensions to trim to the batch size.
        is_count: it is the batch size itself.
        argument: position of the argument that it is; None for a tensor of its own.
        earlier: number of an earlier result that it is.
        computed: its size is computed from the batch size: only the captured size has it.
    """

    dims: tuple[int, ...] = ()
    is_count: bool = False
    argument: int | None = None
    earlier: int | None = None
    computed: bool = False


@dataclass(frozen=True, slots=True)
class BatchShape:
    """Arguments of ``execution_fn`` and its results, as far as the batch size matters.

    Attributes:
        names: its parameters, in order.
        staged: tensor arguments.
        sizes: positions of arguments that are the batch size.
        numbers: position → label, for arguments that are another size.
        others: the other sizes.
        equal: sizes declared to equal the batch size; a call in which one doesn't runs uncaptured.
        weights: position → path, for weights that are passed per call.
        results: one rule per result.
        symbols: what the trace calls the batch size; none where it has it as a number.
        low, high: batch sizes that the trace allows; None where there is no bound.
        guards: further conditions on sizes, as Python text over the symbols.
        symbol: what they call the batch size.
        example: the batch size of the example, if that is known.
    """

    names: tuple[str, ...]
    staged: tuple[StagedInput, ...]
    sizes: tuple[int, ...]
    numbers: Mapping[int, str]
    others: tuple[OtherSize, ...]
    equal: tuple[OtherSize, ...]
    weights: Mapping[int, str]
    results: tuple[ResultRule, ...]
    symbols: frozenset[str]
    low: int
    high: int | None
    guards: tuple[str, ...]
    symbol: str
    example: int | None = None

    @property
    def dynamic(self) -> tuple[StagedInput, ...]:
        return tuple(each for each in self.staged if each.dim is not None)

    def refusal(self, size: int, others: Mapping[str, int]) -> str | None:
        """Why no batch of ``size`` is served with these other sizes, or None."""
        values = {self.symbol: size, **{each.symbol: size for each in self.equal}}
        bounds = [("sizes", self.symbol, self.low, self.high)]
        for other in self.others:
            values[other.symbol] = others[other.label]
            bounds.append((other.label, other.symbol, other.low, other.high))
        for what, symbol, low, high in bounds:
            bounded = symbol and (low is not None or high is not None)
            if bounded and not evaluate(range_text(symbol, low, high), values):
                most = "" if high is None else f" to {high}"
                return f"the trace allows {what} from {low or 0}{most}"
        for guard in self.guards:
            # What depends on a number's value is for each call to check.
            if symbols_in(guard) <= values.keys() and not evaluate(guard, values):
                return f"the trace requires {guard}"
        return None
