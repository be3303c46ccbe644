"""Whether one compiled form serves every size of a batch, 0 and 1 too: pieces are tried.

A piece's graph runs on made data with 3, 1 and 0 rows. Each value must have the shape that was
traced, no copy that is written to may be none for one row, and the compiled form must do the same.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx
from torch._ops import HigherOrderOperator
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from piecework.closeness import same_values
from piecework.codegen.graph.origin import graph_of, value_of
from piecework.codegen.graph.structure import Structure, input_signature, structure_of
from piecework.errors import CaptureError, InputError
from piecework.runtime import torch_compat
from piecework.runtime.trace.writes import (
    memory_of,
    unwritten_outputs,
    written_inputs,
    written_memory,
)

ROWS = (3, 1, 0)
Compiled = Callable[..., object]


class _Unlike(Exception):
    """What a run shows to be otherwise than it was traced."""


class NotAdmitted(CaptureError):
    """A trace may not serve every size; the caller makes one for larger sizes."""


@dataclass
class EverySize:
    """The try of one trace's pieces, each different one once."""

    symbols: Collection[str]
    weights: Mapping[str, torch.Tensor]
    rows_in_one: bool = False
    _runs: dict[str, list[_Run]] = field(default_factory=dict)

    def before(self, split_gm: torch.fx.GraphModule, names: Sequence[str]) -> dict[str, Structure]:
        """What each piece is, once all are known to run with every size; before any is compiled."""
        structures: dict[str, Structure] = {}
        first: dict[str, str] = {}  # structure → the piece that is run for all of it
        # memory that is apart for several rows alone → what is no copy for one
        shared: dict[int | None, str] = {}
        calls = {str(n.target): n for n in split_gm.graph.find_nodes(op="call_module")}
        for name in names:
            piece = graph_of(split_gm, name)
            structures[name] = structure_of(piece, describe_input=input_signature)
            one = first.setdefault(structures[name].key, name)
            if one == name:
                given = map(str, calls[name].args)  # by name
                try:
                    self.require_runs(name, piece, [self.weights.get(each) for each in given])
                except _Unlike as unlike:
                    raise NotAdmitted(f"{name}: {unlike}") from None
            nodes = list(piece.graph.nodes)
            for pair in (pair for run in self._runs.get(one, ()) for pair in run.conflicts):
                for number in pair:
                    shared[memory_of(value_of(nodes[number]))] = nodes[max(pair)].name
        for name in calls if shared else ():
            for key in written_memory(graph_of(split_gm, name), shared):  # type: ignore[arg-type]
                raise NotAdmitted(
                    f"{shared[key]} is no copy where the batch is one row, and it or what it is a copy of is written to"
                )
        return structures

    def require_runs(
        self, name: str, piece: torch.fx.GraphModule, weights: Sequence[torch.Tensor | None]
    ) -> None:
        """Run ``piece`` with each number of rows; ``weights``: the model's own among its inputs."""
        self._require_tried(piece)
        hints: dict[str, int] = {}
        for value in (value_of(node) for node in piece.graph.nodes):
            for size in value.shape if isinstance(value, torch.Tensor) else (value,):
                hints |= torch_compat.symbol_hints(size)
        runs = self._runs[name] = []
        for rows in ROWS:
            try:
                with torch.no_grad(), warnings.catch_warnings(action="ignore"):
                    runs.append(_Run.of(piece, hints | dict.fromkeys(self.symbols, rows), weights))
            except _Unlike:
                raise
            except Exception as error:  # an operator has no answer for so many rows
                if not rows and isinstance(error, RuntimeError):
                    continue  # operators refuse a batch of no rows, eagerly and in each call too
                why = f"it does not run with {rows} rows: {_first_line(error)}"
                raise _Unlike(why) from error

    def after(self, compiled: Mapping[str, Compiled]) -> None:
        """Compare what the pieces were compiled to with their graphs."""
        runs = [(name, run) for name, found in self._runs.items() for run in found]
        self._runs.clear()
        for name, run in runs:
            try:
                run.require_alike(compiled[name], self.rows_in_one)
            except _Unlike as unlike:
                raise NotAdmitted(f"{name}: {unlike}") from None
            except InputError:
                continue  # outside the compiled ranges: a call of that size is refused too
            except Exception as error:
                why = f"what it was compiled to does not run: {_first_line(error)}"
                raise NotAdmitted(f"{name}: {why}") from error

    def _require_tried(self, piece: torch.fx.GraphModule) -> None:
        for node in piece.graph.nodes:
            if isinstance(node.target, HigherOrderOperator):
                raise _Unlike(f"{node.target.name()} runs a graph of its own")
            if "conv" in getattr(node.target, "__name__", str(node.target)):
                raise _Unlike("the compiler chooses the layout of a convolution")
            tensors = [node] if node.op == "placeholder" else []
            tensors += node.all_input_nodes if node.op == "output" and not self.rows_in_one else []
            for each in tensors:
                if self._in_stride(value_of(each)):
                    raise _Unlike(f"{each.name} has a stride that is made of the batch size")

    def _in_stride(self, value: Any) -> bool:
        if memory_of(value) is None:
            return False
        return any(
            set(torch_compat.symbols_in(step)) & set(self.symbols)
            for size, step in zip(value.shape, value.stride(), strict=True)
            if not (self.rows_in_one and type(size) is int and size == 1)
        )


@dataclass
class _Run:
    """One run of a piece's graph."""

    given: list[object]  # what it was given, as it was before
    own: Collection[int]  # numbers of inputs that are the model's own tensors and not written to
    expected: list[object]  # what it gave
    after: list[object]  # what it left in what it was given
    unwritten: Collection[int]  # numbers of results whose memory nothing wrote to
    conflicts: set[tuple[int, int]]  # nodes that share memory and were traced apart

    @classmethod
    def of(
        cls,
        piece: torch.fx.GraphModule,
        sizes: Mapping[str, int],
        weights: Sequence[torch.Tensor | None],
    ) -> _Run:
        written = written_inputs(piece)
        own = {n for n, each in enumerate(weights) if each is not None and n not in written}
        inputs = enumerate(piece.graph.find_nodes(op="placeholder"))
        given = [weights[n] if n in own else _made(value_of(node), sizes) for n, node in inputs]
        after, run = _copies(given, own), _AsTraced(piece, sizes)
        with _NothingDrawn():
            expected = pytree.tree_leaves(run.run(*after))
        return cls(given, own, expected, after, unwritten_outputs(piece), run.conflicts)

    def require_alike(self, compiled: Compiled, any_order: bool) -> None:
        """Run the compiled form on the same data; raises `_Unlike` if it gives something else."""
        ours = _copies(self.given, self.own)
        with torch.no_grad(), warnings.catch_warnings(action="ignore"):
            found = pytree.tree_leaves(compiled(*ours))
        if len(found) != len(self.expected):
            raise _Unlike("it gives another number of results")
        pairs = zip((*ours, *found), (*self.after, *self.expected), strict=True)
        for number, (one, other) in enumerate(pairs, -len(ours)):
            _require_equal(one, other, any_order, number not in self.unwritten)
        if _sharing(found, ours) != _sharing(self.expected, self.after):
            raise _Unlike("its results share memory in another way")


class _AsTraced(torch.fx.Interpreter):
    """Runs a piece's graph, and compares shapes, and which values share memory, with the trace."""

    def __init__(self, piece: torch.fx.GraphModule, sizes: Mapping[str, int]) -> None:
        super().__init__(piece, garbage_collect_values=False)  # so that no memory is used again
        self.extra_traceback = False
        self._sizes = sizes
        self._numbers = {node: number for number, node in enumerate(piece.graph.nodes)}
        self._first: dict[int, torch.fx.Node] = {}
        self.conflicts: set[tuple[int, int]] = set()

    def run_node(self, n: torch.fx.Node) -> Any:
        value = super().run_node(n)
        traced = value_of(n)
        if not (isinstance(value, torch.Tensor) and isinstance(traced, torch.Tensor)):
            return value
        shape = [torch_compat.number_at(size, self._sizes) for size in traced.shape]
        if list(value.shape) != shape:
            raise _Unlike(f"{n.name} has shape {list(value.shape)} and was traced as {shape}")
        memory = memory_of(value)
        if memory is not None and value.numel():
            first = self._first.setdefault(memory, n)
            if memory_of(value_of(first)) != memory_of(traced):
                self.conflicts.add((self._numbers[first], self._numbers[n]))
        return value


class _NothingDrawn(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise _Unlike(f"{func} draws random numbers")
        return func(*args, **(kwargs or {}))


def _made(fake: Any, sizes: Mapping[str, int]) -> object:
    """Data for an input: zeros where numbers may be indices, else fractions that roots take."""
    if not isinstance(fake, torch.Tensor):
        return torch_compat.number_at(fake, sizes) if isinstance(fake, torch.SymInt) else fake
    shape, strides, (offset,) = (
        [torch_compat.number_at(each, sizes) or 0 for each in group]
        for group in (fake.shape, fake.stride(), (fake.storage_offset(),))
    )
    reach = offset + 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True) if n)
    memory = torch.zeros(reach, dtype=fake.dtype, device=fake.device)
    if fake.dtype.is_floating_point or fake.dtype.is_complex:
        steps = torch.arange(reach, device=fake.device) % 97
        memory.copy_(0.25 + steps / 128)
    elif fake.dtype is torch.bool:
        memory.fill_(True)
    return memory.as_strided(shape, strides, offset)


def _copies(values: Sequence[object], but: Collection[int]) -> list[object]:
    """``values`` with copies of the tensors, but for some by number."""
    found = list(values)
    for number, value in enumerate(values):
        if isinstance(value, torch.Tensor) and number not in but:
            memory = torch.empty(0, dtype=value.dtype, device=value.device)
            memory.set_(value.untyped_storage().clone())
            found[number] = memory.as_strided(value.shape, value.stride(), value.storage_offset())
    return found


def _require_equal(one: object, other: object, any_order: bool, values: bool = True) -> None:
    if one is other:
        return
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if (one.shape, one.dtype) != (other.shape, other.dtype):
            raise _Unlike(f"it gives {one.dtype} {[*one.shape]} for {other.dtype} {[*other.shape]}")
        matters = one.numel() and not any_order and min(one.shape, default=1) > 1
        if matters and one.stride() != other.stride():
            raise _Unlike(f"it gives strides {one.stride()} for {other.stride()}")
    if values and not same_values(one, other):
        raise _Unlike("it computes something else")


def _sharing(results: Sequence[object], given: Sequence[object]) -> list[list[int]]:
    """For each result, the first of results and inputs that lie in each memory."""
    tensors = [each for each in (*given, *results) if isinstance(each, torch.Tensor)]
    keys = [each.untyped_storage()._cdata if each.numel() else None for each in tensors]
    return [[i for i, other in enumerate(keys) if key is not None and other == key] for key in keys]


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
