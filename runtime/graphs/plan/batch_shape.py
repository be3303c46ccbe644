"""How a stitched graph depends on its batch size: what is staged, frozen, trimmed and served.

The batch size is the first dynamic dimension of the inputs, and every other one that has its symbol.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.fx

from piecework.codegen.entry.checks import range_text
from piecework.codegen.entry.plan import Symbol
from piecework.codegen.graph.origin import results_of, value_of
from piecework.codegen.plan.size_text import evaluate, symbols_in
from piecework.errors import ConfigError, StaticGraphError
from piecework.runtime import torch_compat
from piecework.runtime.pieces.program import Program
from piecework.runtime.trace.inputs import Argument, GraphInput, Layout, Size
from piecework.runtime.trace.one_trace import ModelTrace
from piecework.runtime.trace.writes import held_by_source, mutations_in, refuse_mutations
from piecework.runtime.watch.weights import Weight

Asked = Mapping[str, Sequence[int] | str]


@dataclass(frozen=True, slots=True)
class StagedInput:
    """A tensor argument: its position among the parameters of ``execution_fn``, and that one's name.

    ``dim`` is its batch dimension, if it has one; ``others`` are the labels of its other symbols.
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
        label, labels: ``x.1`` is dimension 1 of argument ``x``, ``n`` an integer; and equal ones.
        symbol: what guards call it.
        position, dim: where a call has it; ``dim`` is None for a number.
        low, high: values that the trace allows; None where there is no bound.
        example: what the example had, captured if nothing else is asked for.
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
        sizes: positions of arguments that are the batch size.
        numbers: position → label, for arguments that are another size.
        equal: sizes that equal the batch size; a call in which one doesn't runs uncaptured.
        weights: position → path, for weights that are passed per call.
        symbols: what the trace calls the batch size; none where it has it as a number.
        low, high: batch sizes that the trace allows; None where there is no bound.
        guards: further conditions on sizes, as Python text, where ``symbol`` is the batch size.
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


@dataclass(frozen=True, slots=True)
class FixedBatch:
    """A batch size that a trace has as a number; ``dims``: flattened argument → its dimension."""

    size: int
    dims: Mapping[int, int]


def batch_dims(captured: ModelTrace, program: Program) -> dict[int, int]:
    """The batch dimension of each flattened argument that has one."""
    found = {}
    nodes = captured.graph.graph.find_nodes(op="placeholder")
    for node, each in zip(nodes, captured.inputs, strict=True):
        symbols = [torch_compat.symbol_of(n) for n in getattr(value_of(node), "shape", ())]
        if isinstance(each, Argument) and program.batch.symbol in symbols:
            found[each.leaf] = symbols.index(program.batch.symbol)
    return found


def batch_shape(
    captured: ModelTrace, program: Program, asked: Asked, fixed: FixedBatch | None = None
) -> BatchShape:
    """Read ``captured`` for capturing static graphs.

    Args:
        asked: the values of other sizes by label, or ``"batch"`` where one equals the batch size;
            so does a dimension 0 of which nothing is said, if it did in the example.
        fixed: the batch size, if the trace has it as a number.

    Raises:
        StaticGraphError: a piece writes to a weight, or an input can't be in a static buffer.
    """
    if fixed is None and program.batch.symbol is None:
        raise StaticGraphError(
            "no input has a dynamic batch dimension, so there is nothing to capture sizes of",
            where="capture",
            hint="mark the batch dimension with torch._dynamo.mark_dynamic and compile again",
        )
    return _Reader(captured, program, asked, fixed).read()


def passed_inputs(
    captured: ModelTrace, program: Program
) -> Iterator[tuple[torch.fx.Node, GraphInput]]:
    """The placeholders that are arguments of ``execution_fn``: all but weights its source holds."""
    bound = {row.path for row in program.source.module.bound}
    nodes = program.split_gm.graph.find_nodes(op="placeholder")
    for node, each in zip(nodes, captured.inputs, strict=True):
        if not (isinstance(each, Weight) and each.path in bound):
            yield node, each


class _Reader:
    """Goes through the inputs and results of one graph."""

    def __init__(
        self, captured: ModelTrace, program: Program, asked: Asked, fixed: FixedBatch | None
    ) -> None:
        self.captured, self.program, self.fixed = captured, program, fixed
        self.symbol = program.batch.symbol if fixed is None else None
        self.passed = list(passed_inputs(captured, program))
        # Where a call has its sizes: label, size, position, and dimension; None for a number.
        self.places: list[tuple[str, object, int, int | None]] = []
        for position, (node, each) in enumerate(self.passed):
            value = value_of(node)
            if isinstance(value, torch.Tensor) and isinstance(each, Argument):
                for dim, size in enumerate(value.shape):
                    self.places.append((f"{each.name}.{dim}", size, position, dim))
            elif isinstance(each, (Argument, Size)):
                self.places.append((self._label(each), value, position, None))
        self.symbols = self._batch_symbols(asked)
        self.sizes = self._sizes()

    def _batch_symbols(self, asked: Asked) -> set[str]:
        """The symbols of the batch size, and of other sizes that equal it."""
        found = {label: size for label, size, *_ in self.places}
        same = {label for label, said in asked.items() if said == "batch"}
        dynamic = {label for label, size in found.items() if torch_compat.symbol_of(size)}
        # A trace of one batch size may have the others that equal it as numbers too.
        wrong = sorted(same.difference(dynamic if self.fixed is None else found))
        if wrong:
            raise ConfigError(
                f"no dynamic size {wrong[0]!r}",
                where="other_sizes",
                hint=f"there are: {', '.join(sorted(dynamic)) or 'none'}",
            )
        batch = [n for n in found.values() if self.symbol and self._is(n, {self.symbol})]
        example = torch_compat.example_of(batch[0]) if batch else None
        firsts = {label for label in dynamic - asked.keys() if label.endswith(".0")}
        if example is not None:
            same |= {n for n in firsts if torch_compat.example_of(found[n]) == example}
        symbols = {self.symbol, *(torch_compat.symbol_of(found[label]) for label in same)}
        return {symbol for symbol in symbols if symbol}

    def _sizes(self) -> dict[str, OtherSize]:
        """The dynamic sizes with a symbol of their own; the first place that has one names it."""
        rows = {each.name: each for each in self.captured.assumptions.symbols()}
        found: dict[str, OtherSize] = {}
        for label, size, position, dim in self.places:
            symbol = torch_compat.symbol_of(size)
            if not torch_compat.symbols_in(size) or symbol == self.symbol:
                continue
            name = self.captured.assumptions.name_of(symbol or "")
            row = rows.get(name)
            if symbol is None or (row is None and symbol not in self.symbols):
                raise StaticGraphError(
                    "has a size that is computed from several, which can't be staged",
                    where=f"input {label}",
                    hint="pass sizes that don't depend on each other",
                )
            before = found.get(symbol)
            if before is None:
                bounds = (None, None) if row is None else (row.low, row.high)
                example = torch_compat.example_of(size)
                before = OtherSize(label, (), name, position, dim, *bounds, example)
            elif dim is None:  # a number is read faster than a shape
                before = replace(before, position=position, dim=None)
            found[symbol] = replace(before, labels=tuple(dict.fromkeys((*before.labels, label))))
        return found

    def read(self) -> BatchShape:
        written = self._written()
        names = tuple(each.name for each in self.program.source.module.entry.parameters)
        staged, sizes, numbers, weights = [], [], {}, {}
        for position, (node, each) in enumerate(self.passed):
            fake, name = value_of(node), names[position]
            if isinstance(each, Weight):
                weights[position] = each.path
            elif isinstance(each, Layout):
                raise _not_dense(self._owner(each))
            elif isinstance(fake, torch.Tensor):
                staged.append(self._staged(position, name, each, fake, node.name in written))
            elif self._is(fake, self.symbols):
                sizes.append(position)
            elif torch_compat.symbols_in(fake):
                numbers[position] = self.sizes[torch_compat.symbol_of(fake) or ""].label
            else:
                raise StaticGraphError(
                    f"is a {type(fake).__name__} that is passed per call, which a graph freezes",
                    where=f"input {name}",
                    hint="make it a constant of the model, or a tensor",
                )
        if all(each.dim is None for each in staged):
            raise StaticGraphError(
                "the graph reads the batch size alone, and no tensor of the batch",
                where="capture",
                hint="there is nothing to replay; don't capture this model",
            )
        rows = {each.name: each for each in self.captured.assumptions.symbols()}
        batch = rows.get(self.captured.assumptions.name_of(self.symbol or ""))
        if self.fixed is not None:
            batch = Symbol("", self.fixed.size, self.fixed.size)
        return BatchShape(
            names=names,
            staged=tuple(staged),
            sizes=tuple(sizes),
            numbers=numbers,
            others=tuple(e for symbol, e in self.sizes.items() if symbol not in self.symbols),
            equal=tuple(e for symbol, e in self.sizes.items() if symbol in self.symbols),
            weights=weights,
            results=tuple(self._results()),
            symbols=frozenset(self.symbols),
            low=max(1, (batch.low if batch is not None else None) or 1),
            high=None if batch is None else batch.high,
            guards=self.captured.assumptions.guards(),
            symbol="" if batch is None else batch.name,
        )

    def _staged(
        self, position: int, name: str, each: Argument | Size, fake: torch.Tensor, written: bool
    ) -> StagedInput:
        empty = any(type(size) is int and size == 0 for size in fake.shape)
        if not (empty or torch_compat.is_traced_contiguous(fake)):
            raise _not_dense(each.name)
        found = [dim for dim, size in enumerate(fake.shape) if self._is(size, self.symbols)]
        if self.fixed is not None and each.leaf in self.fixed.dims:
            found.insert(0, self.fixed.dims[each.leaf])
        if len(found) > 1:
            raise StaticGraphError(
                f"has the batch size in dimensions {found}; one can be padded",
                where=f"input {each.name}",
                hint="compute the larger tensor inside a splitting op",
            )
        others = {
            dim: self.sizes[torch_compat.symbol_of(size) or ""].label
            for dim, size in enumerate(fake.shape)
            if dim not in found and torch_compat.symbols_in(size)
        }
        return StagedInput(position, name, fake, next(iter(found), None), others, written)

    def _is(self, size: object, symbols: Collection[str]) -> bool:
        return torch_compat.symbol_of(size) in symbols

    def _label(self, each: Argument | Size) -> str:
        """An integer argument is named by itself, a size by its tensor."""
        return each.name if isinstance(each, Argument) else f"{self._owner(each)}.{each.dim}"

    def _owner(self, each: Size | Layout) -> str:
        arguments = (a for a in self.captured.inputs if isinstance(a, Argument))
        return next((a.name for a in arguments if a.leaf == each.leaf), each.name)

    # --- results -----------------------------------------------------------------------------------

    def _results(self) -> Iterator[ResultRule]:
        arguments = {id(value_of(node)): number for number, (node, _) in enumerate(self.passed)}
        earlier: dict[int, int] = {}
        for index, node in enumerate(results_of(self.program.split_gm.graph)):
            value = value_of(node) if isinstance(node, torch.fx.Node) else node
            if not isinstance(value, torch.Tensor):
                is_count = self._is(value, self.symbols)
                computed = not is_count and self._has_batch(value)
                yield ResultRule(is_count=is_count, computed=computed)
                continue
            held = [d for d, size in enumerate(value.shape) if self._has_batch(size)]
            if not all(self._is(value.shape[d], self.symbols) for d in held):
                yield ResultRule(computed=True)
                continue
            first = earlier.setdefault(id(value), index)
            yield ResultRule(
                dims=tuple(held),
                argument=arguments.get(id(value)),
                earlier=None if first == index else first,
            )

    def _has_batch(self, size: object) -> bool:
        return not self.symbols.isdisjoint(torch_compat.symbols_in(size))

    def _written(self) -> frozenset[str]:
        """The arguments that the graph writes to; a piece that writes to weights is refused."""
        split_gm, pieces = self.program.split_gm, self.program.source.submod_names
        nodes = split_gm.graph.find_nodes(op="placeholder")
        pairs = list(zip(nodes, self.captured.inputs, strict=True))
        held = {node.name: each.path for node, each in pairs if isinstance(each, Weight)}
        refuse_mutations(mutations_in(split_gm, pieces, held or held_by_source(split_gm)))
        every = [item.submod_name for item in self.program.items]
        arguments = {n.name: n.name for n, each in pairs if isinstance(each, Argument)}
        return frozenset(each.path for each in mutations_in(split_gm, every, arguments))


def _not_dense(name: str) -> StaticGraphError:
    return StaticGraphError(
        "was traced strided or inside a larger tensor, and its static buffer is dense",
        where=f"input {name}",
        hint="trace with contiguous example arguments",
    )
