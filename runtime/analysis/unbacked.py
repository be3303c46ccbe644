"""Whether one compiled form serves every size of a batch: tries pieces that were traced with a size that no number stands behind.

It is tried: the piece's graph runs on made data with 3, 1 and 0 rows, each value must have the shape that was traced, and the compiled
form must give equal values, shapes and strides. Splitting ops and the model's Python are not run; a piece that draws random numbers,
convolves, or runs a graph of its own is not tried.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx
from torch._ops import HigherOrderOperator
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from piecework.codegen.graph.origin import graph_of, value_of
from piecework.codegen.graph.structure import Structure, input_signature, structure_of
from piecework.errors import CaptureError, InputError
from piecework.runtime import torch_compat
from piecework.runtime.analysis.writes import (
    computes,
    copies_by_layout,
    last_writes,
    memory_of,
    unwritten_outputs,
)

SIZES = (3, 1, 0)
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
Compiled = Callable[..., object]


class _Unlike(Exception):
    """What a run shows to be otherwise than it was traced."""


class NotAdmitted(CaptureError):
    """A trace may not serve every size; the caller makes one for larger sizes."""


@dataclass
class EverySize:
    """The try of one trace's pieces, each different one once.

    Args:
        symbols: torch's names of the batch size, such as ``{"u0"}``; other symbols have the example's numbers.
        weights: the model's own tensors, by the graph's placeholder.
        rows_in_one: values are ``[1, rows, …]``, so that the batch size is in the stride of the first dimension, which nothing reads; and
            whatever a piece's results are handed to takes them in any order in memory.
    """

    symbols: Collection[str]
    weights: Mapping[str, torch.Tensor]
    rows_in_one: bool = False
    _runs: dict[str, list[_Run]] = field(default_factory=dict)

    def before(self, split_gm: torch.fx.GraphModule, names: Sequence[str]) -> dict[str, Structure]:
        """What each piece is, once all are known to run with every size; before any is compiled.

        Raises:
            NotAdmitted: one does not.
        """
        found: dict[str, Structure] = {}
        seen: set[str] = set()
        calls = {str(n.target): n for n in split_gm.graph.find_nodes(op="call_module")}
        for name in names:
            piece = graph_of(split_gm, name)
            found[name] = structure_of(piece, describe_input=input_signature)
            if found[name].key in seen:
                continue
            seen.add(found[name].key)
            pairs = zip(piece.graph.find_nodes(op="placeholder"), calls[name].args, strict=True)
            weights = {
                own.name: self.weights[given.name]
                for own, given in pairs
                if isinstance(given, torch.fx.Node) and given.name in self.weights
            }
            reason = self.refusal(name, piece, weights)
            if reason is not None:
                raise NotAdmitted(f"{name}: {reason}")
        return found

    def refusal(
        self, name: str, piece: torch.fx.GraphModule, weights: Mapping[str, torch.Tensor]
    ) -> str | None:
        """Why ``piece`` need not be compiled for every size; ``weights``: the model's own tensors among its inputs, by placeholder."""
        said = self._never_tried(piece)
        if said is not None:
            return said
        try:
            with torch.no_grad(), warnings.catch_warnings(action="ignore"):
                self._runs[name] = [*self._runs_of(piece, weights)]
        except _Unlike as unlike:
            return str(unlike)
        except Exception as error:  # noqa: BLE001  (an operator has no answer for so many rows)
            return f"it does not run with {', '.join(map(str, SIZES))} rows: {_first_line(error)}"
        return None

    def _runs_of(
        self, piece: torch.fx.GraphModule, weights: Mapping[str, torch.Tensor]
    ) -> Iterator[_Run]:
        for rows in SIZES:
            try:
                yield _Run.of(piece, self._sizes(piece, rows), weights)
            except RuntimeError:
                if rows:
                    raise
                # The model's own operators refuse a batch of no rows, eagerly and in each call too.

    def after(self, compiled: Mapping[str, Compiled]) -> None:
        """Compare what the pieces were compiled to with their graphs.

        Raises:
            NotAdmitted: one does something else.
        """
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

    def _sizes(self, piece: torch.fx.GraphModule, rows: int) -> dict[str, int]:
        values = [value_of(node) for node in piece.graph.nodes]
        found: dict[str, int] = {}
        for value in values:
            for size in value.shape if isinstance(value, torch.Tensor) else (value,):
                if isinstance(size, torch.SymInt):
                    found.update(torch_compat.symbol_hints(size))
        return {**found, **dict.fromkeys(self.symbols, rows)}

    def _never_tried(self, piece: torch.fx.GraphModule) -> str | None:
        for node in piece.graph.nodes:
            name = getattr(node.target, "__name__", str(node.target))
            if isinstance(node.target, HigherOrderOperator):
                return f"{node.target.name()} runs a graph of its own"
            if node.op == "call_function" and not computes(node.target):
                return f"{node.name} is no operator: it changes what those after it mean"
            if "conv" in name:
                return "the compiler chooses the layout of a convolution"
            tensors = [node] if node.op == "placeholder" else []
            tensors += node.all_input_nodes if node.op == "output" and not self.rows_in_one else []
            for each in tensors:
                if self._in_stride(value_of(each)):
                    return f"{each.name} has a stride that is made of the batch size"
        return None

    def _in_stride(self, value: object) -> bool:
        if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
            return False
        pairs = zip(value.shape, value.stride(), strict=True)
        steps = [
            n for size, n in pairs if not (self.rows_in_one and type(size) is int and size == 1)
        ]
        return any(set(torch_compat.symbols_in(each)) & set(self.symbols) for each in steps)


@dataclass
class _Run:
    """One run of a piece's graph.

    Attributes:
        given: what it was given, as it was before.
        expected: what it gave.
        after: what it left in what it was given.
    unwritten: numbers of results whose memory nothing wrote to.
    """

    given: list[object]
    expected: list[object]
    after: list[object]
    unwritten: Collection[int]

    @classmethod
    def of(
        cls,
        piece: torch.fx.GraphModule,
        sizes: Mapping[str, int],
        weights: Mapping[str, torch.Tensor],
    ) -> _Run:
        inputs = piece.graph.find_nodes(op="placeholder")
        keys = {memory_of(value_of(node)) for node in inputs if node.name in weights} - {None}
        written = last_writes(piece, keys)  # type: ignore[arg-type]
        given: list[object] = []
        for node in inputs:
            own = weights.get(node.name)
            if own is None or memory_of(value_of(node)) in written:
                given.append(_made(value_of(node), sizes))
            else:
                given.append(own)
        after = [
            _copy(each) if node.name not in weights else each
            for node, each in zip(inputs, given, strict=True)
        ]
        with _NothingDrawn():
            expected = _AsTraced(piece, sizes).run(*after)
        return cls(given, pytree.tree_leaves(expected), after, unwritten_outputs(piece))

    def require_alike(self, compiled: Compiled, any_order: bool) -> None:
        """Run the compiled form on the same data.

        Raises:
            _Unlike: it gives something else.
        """
        ours = [
            mine if theirs is mine else _copy(mine)
            for mine, theirs in zip(self.given, self.after, strict=True)
        ]
        with torch.no_grad(), warnings.catch_warnings(action="ignore"):
            found = pytree.tree_leaves(compiled(*ours))
        if len(found) != len(self.expected):
            raise _Unlike("it gives another number of results")
        for number, (one, other) in enumerate(zip(found, self.expected, strict=True)):
            _require_equal(one, other, any_order, number not in self.unwritten)
        for one, other in zip(ours, self.after, strict=True):
            _require_equal(one, other, any_order)
        if _sharing(found, ours) != _sharing(self.expected, self.after):
            raise _Unlike("its results share memory in another way")


class _AsTraced(torch.fx.Interpreter):
    """Runs a piece's graph, and compares the shape of each value with what was traced."""

    def __init__(self, piece: torch.fx.GraphModule, sizes: Mapping[str, int]) -> None:
        super().__init__(piece)
        self.extra_traceback = False
        self._sizes = sizes

    def run_node(self, n: torch.fx.Node) -> Any:
        value = super().run_node(n)
        traced = value_of(n)
        if isinstance(value, torch.Tensor) and isinstance(traced, torch.Tensor):
            shape = [torch_compat.number_at(size, self._sizes) for size in traced.shape]
            if list(value.shape) != shape:
                raise _Unlike(f"{n.name} has shape {list(value.shape)} and was traced as {shape}")
        return value


class _NothingDrawn(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise _Unlike(f"{func} draws random numbers")
        return func(*args, **(kwargs or {}))


def written_copies(graph: torch.fx.GraphModule) -> str | None:
    """Why a whole graph, with the operators that it is cut at, can't serve a size of 1 as it serves others; None if it can.

    There what ``contiguous`` or ``reshape`` copies is in order already and is not copied, and a write to either is a write to both.
    """
    copies = list(copies_by_layout(graph))
    written = last_writes(graph, {key for _, own, taken in copies for key in (own, *taken)})
    if not written:
        return None
    used, nodes = _last_uses(graph), list(graph.graph.nodes)
    for number, own, taken in copies:
        pairs = [pair for each in taken for pair in ((own, each), (each, own))]
        if any(written.get(one, -1) > number and used[other] > number for one, other in pairs):
            return f"{nodes[number].name} is no copy where the batch is one row, and it or what it is a copy of is written to"
    return None


def _last_uses(graph: torch.fx.GraphModule) -> dict[int, float]:
    """Memory → the number of the last node that has to do with it; infinity where it is an argument's or a result's, which outlive the graph."""
    used: dict[int, float] = {}
    for number, node in enumerate(graph.graph.nodes):
        for each in (node, *node.all_input_nodes):
            key = memory_of(value_of(each))
            if key is not None:
                outlives = each.op == "placeholder" or node.op == "output"
                used[key] = math.inf if outlives else max(number, used.get(key, 0))
    return used


def _made(fake: Any, sizes: Mapping[str, int]) -> object:
    """Data for an input: zeros where numbers may be indices, else fractions that roots and logarithms take."""
    if not isinstance(fake, torch.Tensor):
        return torch_compat.number_at(fake, sizes) if isinstance(fake, torch.SymInt) else fake
    shape, strides, offset = (
        [torch_compat.number_at(each, sizes) or 0 for each in group]
        for group in (fake.shape, fake.stride(), (fake.storage_offset(),))
    )
    reach = offset[0] + 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True) if n)
    memory = torch.zeros(reach, dtype=fake.dtype, device=fake.device)
    if fake.dtype.is_floating_point or fake.dtype.is_complex:
        steps = torch.arange(reach, device=fake.device) % 97
        memory.copy_(0.25 + steps / 128)
    elif fake.dtype is torch.bool:
        memory.fill_(True)
    return memory.as_strided(shape, strides, offset[0])


def _copy(value: object) -> object:
    if not isinstance(value, torch.Tensor):
        return value
    memory = torch.empty(0, dtype=value.dtype, device=value.device)
    memory.set_(value.untyped_storage().clone())
    return memory.as_strided(value.shape, value.stride(), value.storage_offset())


def _require_equal(one: object, other: object, any_order: bool, values: bool = True) -> None:
    if one is other:
        return
    if not (isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)):
        if one != other:
            raise _Unlike(f"it gives {one!r} for {other!r}")
        return
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        raise _Unlike(f"it gives {_kind(one)} for {_kind(other)}")
    matters = one.numel() and not any_order and min(one.shape, default=1) > 1
    if matters and one.stride() != other.stride():
        raise _Unlike(f"it gives strides {one.stride()} for {other.stride()}")
    tolerance = _TOLERANCE.get(other.dtype, 1e-4 if other.is_complex() else 0.0)
    if not values:
        return
    wide = torch.complex128 if other.is_complex() else torch.float64
    margins = {"rtol": tolerance, "atol": tolerance * _largest(other)}
    if not torch.allclose(one.to(wide), other.to(wide), equal_nan=True, **margins):
        raise _Unlike("it computes something else")


def _largest(tensor: torch.Tensor) -> float:
    if not tensor.numel():
        return 0.0
    found = float(tensor.abs().double().nan_to_num(0, 0, 0).max())
    return max(found, 1e-3)


def _kind(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"


def _sharing(results: Sequence[object], given: Sequence[object]) -> list[list[int]]:
    """For each result, the first of results and inputs that lie in each memory."""
    tensors = [each for each in (*given, *results) if isinstance(each, torch.Tensor)]
    keys = [each.untyped_storage()._cdata if each.numel() else None for each in tensors]
    return [[i for i, other in enumerate(keys) if key is not None and other == key] for key in keys]


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
