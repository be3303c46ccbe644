"""From a captured graph to its batch shape. In: a capture and its program. Out: which inputs are staged along which dimension, which numbers are frozen, and how results are trimmed.

It refuses what a captured graph can't serve at another size than its own; it runs nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
import torch.fx

from piecework.codegen.entry.plan import Symbol
from piecework.codegen.graph.origin import results_of, value_of
from piecework.errors import ConfigError, StaticGraphError
from piecework.runtime import torch_compat
from piecework.runtime.analysis.writes import held_by_source, mutations_in, refuse_mutations
from piecework.runtime.graphs.plan.batch_shape import BatchShape, OtherSize, ResultRule, StagedInput
from piecework.runtime.pieces.program import Program
from piecework.runtime.trace.inputs import Argument, GraphInput, Layout, Size
from piecework.runtime.trace.one_trace import ModelTrace
from piecework.runtime.watch.weights import Weight


@dataclass(frozen=True, slots=True)
class FixedBatch:
    """A batch size that a trace has as a number: ``dims`` says of which dimension of each flattened argument."""

    size: int
    dims: Mapping[int, int]


def batch_dims(captured: ModelTrace, program: Program) -> dict[int, int]:
    """The batch dimension of each flattened argument that has one."""
    found = {}
    for node, each in zip(
        captured.graph.graph.find_nodes(op="placeholder"), captured.inputs, strict=True
    ):
        value = value_of(node)
        if isinstance(each, Argument) and isinstance(value, torch.Tensor):
            symbols = [torch_compat.symbol_of(size) for size in value.shape]
            if program.batch.symbol in symbols:
                found[each.leaf] = symbols.index(program.batch.symbol)
    return found


def batch_shape(
    captured: ModelTrace,
    program: Program,
    same: Collection[str] = (),
    fixed: FixedBatch | None = None,
) -> BatchShape:
    """Read ``captured`` for capturing static graphs.

    Args:
        same: labels of sizes that always equal the batch size, although the trace gave them symbols of their own.
        fixed: the batch size, if the trace has it as a number.

    Raises:
        StaticGraphError: something writes to a weight inside a piece, or an input can't be held in a static buffer.
    """
    symbol = "" if fixed is not None else program.batch.symbol
    if symbol is None:
        raise StaticGraphError(
            "no input has a dynamic batch dimension, so there is nothing to capture sizes of",
            where="capture",
            hint="mark the batch dimension with torch._dynamo.mark_dynamic and compile again",
        )
    return _Reader(captured, program, symbol, same, fixed).read()


def passed_inputs(
    captured: ModelTrace, program: Program
) -> Iterator[tuple[torch.fx.Node, GraphInput]]:
    """The placeholders that are arguments of ``execution_fn``, in order: all but the weights that its source holds."""
    bound = {row.path for row in program.source.module.bound}
    nodes = program.split_gm.graph.find_nodes(op="placeholder")
    for node, each in zip(nodes, captured.inputs, strict=True):
        if not (isinstance(each, Weight) and each.path in bound):
            yield node, each


class _Reader:
    """Goes through the inputs and results of one graph."""

    def __init__(
        self,
        captured: ModelTrace,
        program: Program,
        symbol: str,
        same: Collection[str],
        fixed: FixedBatch | None,
    ) -> None:
        source, split_gm = program.source, program.split_gm
        self.captured, self.symbol, self.same = captured, symbol, frozenset(same)
        self.fixed = fixed
        self.split_gm, self.source = split_gm, source
        self.every = [item.submod_name for item in program.items]
        nodes = split_gm.graph.find_nodes(op="placeholder")
        self.pairs = list(zip(nodes, captured.inputs, strict=True))
        self.passed = list(passed_inputs(captured, program))
        self.known = {each.name: each for each in captured.assumptions.symbols()}
        self.others: dict[str, OtherSize] = {}
        self.equal: dict[str, OtherSize] = {}
        self.symbols = ({symbol} if fixed is None else set()) | self._same_symbols()

    def read(self) -> BatchShape:
        self._refuse_writes_to_weights()
        names = tuple(parameter.name for parameter in self.source.module.entry.parameters)
        written = self._written()
        staged, sizes, numbers, weights = [], [], {}, {}
        for position, (node, each) in enumerate(self.passed):
            fake, name = value_of(node), names[position]
            if isinstance(each, Weight):
                weights[position] = each.path
            elif isinstance(each, Layout):
                raise StaticGraphError(
                    "was traced strided or inside a larger tensor, and its static buffer is dense",
                    where=f"input {self._owner(each)}",
                    hint="trace with dense example arguments",
                )
            elif isinstance(fake, torch.Tensor):
                staged.append(self._staged(position, name, each, fake, node.name in written))
            elif torch_compat.symbol_of(fake) in self.symbols:
                sizes.append(position)
                self._note_same(self._number_label(each), fake, position, None)
            else:
                numbers[position] = self._number(position, name, each, fake)
        batch = self.known.get(self.captured.assumptions.name_of(self.symbol))
        if self.fixed is not None:
            batch = Symbol("", self.fixed.size, self.fixed.size)
        if all(each.dim is None for each in staged):
            raise StaticGraphError(
                "the graph reads the batch size alone, and no tensor of the batch",
                where="capture",
                hint="there is nothing to replay; don't capture this model",
            )
        return BatchShape(
            names=names,
            staged=tuple(staged),
            sizes=tuple(sizes),
            numbers=numbers,
            others=tuple(self.others.values()),
            equal=tuple(self.equal.values()),
            weights=weights,
            results=self._results(),
            symbols=frozenset(self.symbols),
            low=max(1, (batch.low if batch is not None else None) or 1),
            high=None if batch is None else batch.high,
            guards=self.captured.assumptions.guards(),
            symbol="" if batch is None else batch.name,
            example=self._example(),
        )

    def _example(self) -> int | None:
        sizes = (
            size
            for node, _ in self.pairs
            if isinstance(value_of(node), torch.Tensor)
            for size in value_of(node).shape  # type: ignore[attr-defined]
        )
        batch = (size for size in sizes if torch_compat.symbol_of(size) == self.symbol)
        return next(map(torch_compat.example_of, batch), None)

    # --- inputs ------------------------------------------------------------------------------------

    def _staged(
        self, position: int, name: str, each: Argument | Size, fake: torch.Tensor, written: bool
    ) -> StagedInput:
        found: list[int] = []
        if self.fixed is not None and isinstance(each, Argument) and each.leaf in self.fixed.dims:
            found.append(self.fixed.dims[each.leaf])
        others: dict[int, str] = {}
        for dim, size in enumerate(fake.shape):
            symbol = torch_compat.symbol_of(size)
            if symbol in self.symbols:
                found.append(dim)
                self._note_same(f"{each.name}.{dim}", size, position, dim)
            elif torch_compat.symbols_of(size):
                others[dim] = self._other(f"{each.name}.{dim}", size, position, dim)
        if len(found) > 1:
            raise StaticGraphError(
                f"has the batch size in dimensions {found}; one can be padded",
                where=f"input {each.name}",
                hint="compute the larger tensor inside a splitting op",
            )
        order = _memory_order(fake, each.name)
        return StagedInput(
            position, name, fake, found[0] if found else None, others, order, written
        )

    def _number(self, position: int, name: str, each: Argument | Size, fake: object) -> str:
        if not torch_compat.symbols_of(fake):
            raise StaticGraphError(
                f"is a {type(fake).__name__} that is passed per call, which a captured graph freezes",
                where=f"input {name}",
                hint="make it a constant of the model, or a tensor",
            )
        return self._other(self._number_label(each), fake, position, None)

    def _number_label(self, each: Argument | Size) -> str:
        """An integer argument is named by itself, a size by its tensor."""
        if isinstance(each, Argument):
            return each.name
        return f"{self._owner(each)}.{each.dim}"

    def _owner(self, each: Size | Layout) -> str:
        arguments = (a for a in self.captured.inputs if isinstance(a, Argument))
        return next((a.name for a in arguments if a.leaf == each.leaf), each.name)

    def _same_symbols(self) -> set[str]:
        """The symbols of the sizes that were declared to equal the batch size.

        Raises:
            ConfigError: a label names no size.
        """
        found: dict[str, str | None] = {}
        for node, each in self.pairs:
            value = value_of(node)
            if isinstance(each, (Weight, Layout)):
                continue
            if isinstance(value, torch.Tensor):
                for dim, size in enumerate(value.shape):
                    found[f"{each.name}.{dim}"] = torch_compat.symbol_of(size)
            else:
                found[self._number_label(each)] = torch_compat.symbol_of(value)
        # A trace of one batch size may have the others that equal it as numbers too.
        known = found if self.fixed is not None else {k for k, v in found.items() if v is not None}
        wrong = sorted(self.same.difference(known))
        if wrong:
            raise ConfigError(
                f"no dynamic size {wrong[0]!r}",
                where="other_sizes",
                hint=f"there are: {', '.join(sorted(k for k, v in found.items() if v)) or 'none'}",
            )
        return {symbol for label in self.same if (symbol := found[label]) is not None}

    def _note_same(self, label: str, size: object, position: int, dim: int | None) -> None:
        """Remember where a call has a size that must equal the batch size."""
        symbol = torch_compat.symbol_of(size)
        if symbol is not None and symbol != self.symbol:
            self.equal.setdefault(
                symbol,
                OtherSize(
                    label,
                    (label,),
                    self.captured.assumptions.name_of(symbol),
                    position,
                    dim,
                    None,
                    None,
                ),
            )

    def _other(self, label: str, size: object, position: int, dim: int | None) -> str:
        """The label of a size beside the batch size; the first place that has it names it."""
        symbol = torch_compat.symbol_of(size)
        name = self.captured.assumptions.name_of(symbol or "")
        if symbol is None or name not in self.known:
            raise StaticGraphError(
                "has a size that is computed from several, which can't be staged",
                where=f"input {label}",
                hint="pass sizes that don't depend on each other",
            )
        before = self.others.get(symbol)
        if before is None:
            row = self.known[name]
            example = torch_compat.example_of(size)
            self.others[symbol] = OtherSize(
                label, (label,), name, position, dim, row.low, row.high, example
            )
            return label
        labels = tuple(dict.fromkeys((*before.labels, label)))
        # A number is read faster than a shape.
        place = (position, None) if dim is None else (before.position, before.dim)
        self.others[symbol] = replace(before, labels=labels, position=place[0], dim=place[1])
        return before.label

    # --- results -----------------------------------------------------------------------------------

    def _results(self) -> tuple[ResultRule, ...]:
        rules = []
        arguments = {id(value_of(node)): number for number, (node, _) in enumerate(self.passed)}
        earlier: dict[int, int] = {}
        for index, node in enumerate(results_of(self.split_gm.graph)):
            value = value_of(node) if isinstance(node, torch.fx.Node) else node
            rule = self._rule(value)
            if not rule.computed and isinstance(value, torch.Tensor):
                same = earlier.setdefault(id(value), index)
                known = None if same == index else same
                rule = replace(rule, argument=arguments.get(id(value)), earlier=known)
            rules.append(rule)
        return tuple(rules)

    def _rule(self, value: object) -> ResultRule:
        if isinstance(value, torch.Tensor):
            sizes = list(value.shape)
            dims = [d for d, n in enumerate(sizes) if torch_compat.symbol_of(n) in self.symbols]
            held = [d for d, size in enumerate(sizes) if self._holds_batch(size)]
            return ResultRule(tuple(dims)) if held == dims else ResultRule(computed=True)
        if torch_compat.symbol_of(value) in self.symbols:
            return ResultRule(is_count=True)
        return ResultRule(computed=self._holds_batch(value))

    def _holds_batch(self, size: object) -> bool:
        return not self.symbols.isdisjoint(torch_compat.symbols_of(size))

    # --- writes ------------------------------------------------------------------------------------

    def _refuse_writes_to_weights(self) -> None:
        held = {node.name: each.path for node, each in self.pairs if isinstance(each, Weight)}
        pieces = self.source.submod_names
        found = mutations_in(self.split_gm, pieces, held or held_by_source(self.split_gm))
        refuse_mutations(found)

    def _written(self) -> frozenset[str]:
        """Names of the placeholders of arguments that something writes to."""
        arguments = {
            node.name: node.name for node, each in self.pairs if isinstance(each, Argument)
        }
        return frozenset(each.path for each in mutations_in(self.split_gm, self.every, arguments))


def _memory_order(fake: torch.Tensor, name: str) -> tuple[int, ...] | None:
    """The dimensions in the order in which they lie in memory; None if that is the usual one.

    Raises:
        StaticGraphError: the tensor has gaps or overlaps, which a static buffer would not have.
    """
    if torch_compat.is_traced_contiguous(fake) or any(
        type(size) is int and size == 0 for size in fake.shape
    ):
        return None
    for order in itertools.permutations(range(fake.dim())):
        if torch_compat.is_traced_contiguous(fake.permute(order)):
            return order
    raise StaticGraphError(
        "was traced with gaps or overlaps in memory, and its static buffer is dense",
        where=f"input {name}",
        hint="trace with dense example arguments",
    )
