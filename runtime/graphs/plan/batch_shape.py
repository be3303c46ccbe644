"""How a stitched graph depends on its batch size: what is staged, frozen, trimmed and served."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.fx

from piecework.codegen.entry.checks import range_text
from piecework.codegen.entry.plan import Symbol
from piecework.codegen.graph.origin import results_of, value_of
from piecework.codegen.plan.size_text import evaluate, symbols_in
from piecework.errors import ConfigError, StaticGraphError
from piecework.runtime import torch_compat
from piecework.runtime.call.entry import Entry
from piecework.runtime.pieces.program import Program
from piecework.runtime.trace.inputs import Argument, GraphInput, Layout, Size
from piecework.runtime.trace.writes import mutations_in, refuse_mutations
from piecework.runtime.watch.weights import Weight

OtherSizes = Mapping[str, int | str]
FixedDims = Mapping[int, int]


@dataclass(frozen=True, slots=True)
class StagedInput:
    position: int  # among the parameters of ``execution_fn``
    name: str  # of that parameter
    fake: torch.Tensor
    dim: int | None  # its batch dimension
    row: tuple[int, ...]  # its shape in a batch of one
    written: bool = False

    def sizes(self, count: int) -> list[int]:
        """Its shape in a batch of ``count``."""
        return [count if dim == self.dim else size for dim, size in enumerate(self.row)]


@dataclass(frozen=True, slots=True)
class OtherSize:
    """Another size (``x.1``, ``n``), fixed; a None ``value`` equals the batch size."""

    label: str
    symbol: str
    position: int
    dim: int | None
    value: int | None
    low: int | None = None
    high: int | None = None

    def fits(self, flat: Sequence[object], count: int) -> bool:
        """Whether a call with a batch of ``count`` has the captured value."""
        given = flat[self.position]
        size = given if self.dim is None else given.shape[self.dim]  # type: ignore[attr-defined]
        return bool(size == (count if self.value is None else self.value))


@dataclass(frozen=True, slots=True)
class ResultRule:
    """What to make of a padded replay's result; ``computed``: right for that size alone."""

    dims: tuple[int, ...] = ()
    is_count: bool = False
    argument: int | None = None
    earlier: int | None = None
    computed: bool = False


@dataclass(frozen=True, slots=True)
class BatchShape:
    """Arguments and results; in ``numbers``, by position, None is the batch size."""

    names: tuple[str, ...]
    staged: tuple[StagedInput, ...]
    numbers: Mapping[int, int | None]
    others: tuple[OtherSize, ...]
    weights: Mapping[int, str]
    results: tuple[ResultRule, ...]
    symbols: frozenset[str]
    low: int
    high: int | None
    guards: tuple[str, ...]
    symbol: str
    written_weights: Sequence[str] = ()

    @property
    def dynamic(self) -> tuple[StagedInput, ...]:
        return tuple(each for each in self.staged if each.dim is not None)

    def sizes(self, count: int) -> dict[str, int]:
        """The size behind each symbol in a batch of ``count``."""
        other = {e.symbol: count if e.value is None else e.value for e in self.others}
        return {self.symbol: count, **other}

    def refusal(self, size: int) -> str | None:
        """Why no batch of ``size`` is served, or None."""
        values = self.sizes(size)
        bounds = [(each.label, each.symbol, each.low, each.high) for each in self.others]
        for what, symbol, low, high in (("sizes", self.symbol, self.low, self.high), *bounds):
            bounded = symbol and (low is not None or high is not None)
            if bounded and not evaluate(range_text(symbol, low, high), values):
                most = "" if high is None else f" to {high}"
                return f"the trace allows {what} from {low or 0}{most}"
        for guard in self.guards:
            # What depends on a number's value is for each call to check.
            if symbols_in(guard) <= values.keys() and not evaluate(guard, values):
                return f"the trace requires {guard}"
        return None


def batch_dims(entry: Entry, program: Program) -> dict[int, int]:
    found = {}
    nodes = program.graph.graph.find_nodes(op="placeholder")
    for node, each in zip(nodes, entry.inputs, strict=True):
        symbols = [torch_compat.symbol_of(n) for n in getattr(value_of(node), "shape", ())]
        if isinstance(each, Argument) and program.batch.symbol in symbols:
            found[each.leaf] = symbols.index(program.batch.symbol)
    return found


def passed_inputs(entry: Entry, program: Program) -> Iterator[tuple[torch.fx.Node, GraphInput]]:
    """The placeholders that are arguments of ``execution_fn``: all but weights its source holds."""
    bound = {row.path for row in program.source.module.bound}
    nodes = program.split_gm.graph.find_nodes(op="placeholder")
    for node, each in zip(nodes, entry.inputs, strict=True):
        if not (isinstance(each, Weight) and each.path in bound):
            yield node, each


def batch_shape(
    entry: Entry, program: Program, given: OtherSizes, fixed: FixedDims | None = None
) -> BatchShape:
    if fixed is None and program.batch.symbol is None:
        why = "no input has a dynamic batch dimension, so there is nothing to capture sizes of"
        hint = "mark the batch dimension with torch._dynamo.mark_dynamic and compile again"
        raise StaticGraphError(why, where="capture", hint=hint)
    symbol = program.batch.symbol if fixed is None else None
    passed = list(passed_inputs(entry, program))
    others = _other_sizes(entry, passed, symbol, given, fixed)
    symbols = {s for s, each in others.items() if each.value is None} | ({symbol} - {None})
    names = tuple(each.name for each in program.source.module.entry.parameters)
    written, written_weights = _written(entry, program)
    staged: list[StagedInput] = []
    numbers: dict[int, int | None] = {}
    weights: dict[int, str] = {}
    for position, (node, each) in enumerate(passed):
        fake, name = value_of(node), names[position]
        if isinstance(each, Weight):
            weights[position] = each.path
        elif isinstance(each, Layout):
            raise _not_dense(_argument_of(entry, each))
        elif isinstance(fake, torch.Tensor):
            dims = [d for d, n in enumerate(fake.shape) if torch_compat.symbol_of(n) in symbols]
            if fixed is not None and each.leaf in fixed:
                dims.insert(0, fixed[each.leaf])
            _require_stageable(each.name, fake, dims)
            row = tuple(
                1 if d in dims else _fixed_size(n, others) for d, n in enumerate(fake.shape)
            )
            dim = next(iter(dims), None)
            staged.append(StagedInput(position, name, fake, dim, row, node.name in written))
        elif torch_compat.symbol_of(fake) in symbols:
            numbers[position] = None
        elif torch_compat.symbols_in(fake):
            numbers[position] = _fixed_size(fake, others)
        else:
            why = f"is a {type(fake).__name__} that is passed per call, which a graph freezes"
            hint = "make it a constant of the model, or a tensor"
            raise StaticGraphError(why, where=f"input {name}", hint=hint)
    if all(each.dim is None for each in staged):
        why = "the graph reads the batch size alone, and no tensor of the batch"
        hint = "there is nothing to replay; don't capture this model"
        raise StaticGraphError(why, where="capture", hint=hint)
    rows = {each.name: each for each in entry.plan().symbols}
    known = rows.get(entry.plan().names.get(symbol or "", ""), Symbol(""))
    batch = known if fixed is None else Symbol("", 1, 1)
    return BatchShape(
        names=names,
        staged=tuple(staged),
        numbers=numbers,
        others=tuple(others.values()),
        weights=weights,
        written_weights=written_weights,
        results=tuple(_results(program.split_gm, passed, symbols)),
        symbols=frozenset(symbols),
        low=max(1, batch.low or 1),
        high=batch.high,
        guards=entry.plan().guards,
        symbol=batch.name,
    )


def _fixed_size(size: object, others: Mapping[str, OtherSize]) -> int:
    known = others.get(torch_compat.symbol_of(size) or "")
    return int(size) if known is None else known.value  # type: ignore[call-overload, return-value]


def _other_sizes(
    entry: Entry,
    passed: Sequence[tuple[torch.fx.Node, GraphInput]],
    batch: str | None,
    given: OtherSizes,
    fixed: FixedDims | None,
) -> dict[str, OtherSize]:
    """The sizes with a symbol beside that of the batch, by that symbol."""
    places: list[tuple[str, object, int, int | None]] = []
    for position, (node, each) in enumerate(passed):
        value = value_of(node)
        if isinstance(value, torch.Tensor) and isinstance(each, Argument):
            for dim, size in enumerate(value.shape):
                places.append((f"{each.name}.{dim}", size, position, dim))
        elif isinstance(each, Argument):
            places.append((each.name, value, position, None))
        elif isinstance(each, Size):
            label = f"{_argument_of(entry, each)}.{each.dim}"
            places.append((label, value, position, None))
    dynamic = {label: size for label, size, *_ in places if torch_compat.symbols_in(size)}
    of_batch = [n for n in dynamic if batch and torch_compat.symbol_of(dynamic[n]) == batch]
    example = torch_compat.example_of(dynamic[of_batch[0]] if of_batch else None)
    # A trace of one batch size may have the others as numbers.
    known = set(dynamic if fixed is None else (label for label, *_ in places))
    known -= {label for label in of_batch if given.get(label) != "batch"}
    if unknown := sorted(given.keys() - known):
        why = f"no dynamic size {unknown[0]!r}"
        hint = f"there are: {', '.join(sorted(dynamic.keys() & known)) or 'none'}"
        raise ConfigError(why, where="other_sizes", hint=hint)
    rows = {each.name: each for each in entry.plan().symbols}
    found: dict[str, OtherSize] = {}
    for label, size, position, dim in places:
        symbol = torch_compat.symbol_of(size)
        if label not in dynamic or symbol == batch:
            continue
        value: object = given.get(label, torch_compat.example_of(size))
        first = label.endswith(".0") and label not in given and example is not None
        if value == "batch" or (first and value == example):
            value = None
        elif value is None:
            raise StaticGraphError(
                "is dynamic beside the batch size, and a captured graph fixes it",
                where=f"input {label}",
                hint=f"pass the value to capture, such as other_sizes={{{label!r}: 16}}, or "
                "'batch' if it always equals that",
            )
        name = entry.plan().names.get(symbol or "", "")
        row = rows.get(name)
        if symbol is None or (row is None and value is not None):
            why = "has a size that is computed from several, which can't be staged"
            hint = "pass sizes that don't depend on each other"
            raise StaticGraphError(why, where=f"input {label}", hint=hint)
        bounds = (None, None) if row is None else (row.low, row.high)
        if symbol not in found or label in given:
            found[symbol] = OtherSize(label, name, position, dim, value, *bounds)  # type: ignore[arg-type]
    return found


def _require_stageable(name: str, fake: torch.Tensor, batch_dims: Sequence[int]) -> None:
    empty = any(type(size) is int and size == 0 for size in fake.shape)
    if not (empty or torch_compat.is_traced_contiguous(fake)):
        raise _not_dense(name)
    if len(batch_dims) > 1:
        why = f"has the batch size in dimensions {batch_dims}; one can be padded"
        hint = "compute the larger tensor inside a splitting op"
        raise StaticGraphError(why, where=f"input {name}", hint=hint)


def _not_dense(name: str) -> StaticGraphError:
    why = "was traced strided or inside a larger tensor, and its static buffer is dense"
    hint = "trace with contiguous example arguments"
    return StaticGraphError(why, where=f"input {name}", hint=hint)


def _argument_of(entry: Entry, each: Size | Layout) -> str:
    arguments = (a for a in entry.inputs if isinstance(a, Argument))
    return next((a.name for a in arguments if a.leaf == each.leaf), each.name)


def _results(
    split_gm: torch.fx.GraphModule,
    passed: Sequence[tuple[torch.fx.Node, GraphInput]],
    symbols: Collection[str],
) -> Iterator[ResultRule]:
    def has_batch(size: object) -> bool:
        return not set(symbols).isdisjoint(torch_compat.symbols_in(size))

    arguments = {id(value_of(node)): number for number, (node, _) in enumerate(passed)}
    earlier: dict[int, int] = {}
    for index, node in enumerate(results_of(split_gm.graph)):
        value = value_of(node) if isinstance(node, torch.fx.Node) else node
        if not isinstance(value, torch.Tensor):
            is_count = torch_compat.symbol_of(value) in symbols
            yield ResultRule(is_count=is_count, computed=not is_count and has_batch(value))
            continue
        dims = tuple(d for d, size in enumerate(value.shape) if has_batch(size))
        if not all(torch_compat.symbol_of(value.shape[d]) in symbols for d in dims):
            yield ResultRule(computed=True)
            continue
        first = earlier.setdefault(id(value), index)
        before = None if first == index else first
        yield ResultRule(dims, argument=arguments.get(id(value)), earlier=before)


def _written(entry: Entry, program: Program) -> tuple[list[str], list[str]]:
    """The arguments and the weights that the graph writes to; in a piece, weights are refused."""
    split_gm, pieces = program.split_gm, program.source.submod_names
    nodes = split_gm.graph.find_nodes(op="placeholder")
    pairs = list(zip(nodes, entry.inputs, strict=True))
    weights = {node.name: each.path for node, each in pairs if isinstance(each, Weight)}
    refuse_mutations(split_gm, pieces, weights)
    every = [item.submod_name for item in program.items]
    arguments = {n.name: n.name for n, each in pairs if isinstance(each, Argument)}
    found = (mutations_in(split_gm, every, held) for held in (arguments, weights))
    in_arguments, in_weights = (list(dict.fromkeys(e.path for e in each)) for each in found)
    return in_arguments, in_weights
