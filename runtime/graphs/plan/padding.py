"""Whether batches may be padded to the next captured size, as declared by the caller and tried.

A padded batch computes on rows that are not there, so each row must be computed from its own alone.
The caller says so with ``pad=True``; without a word, operators of others must say so, none of
torch's may make one value of all rows, and nothing without rows may be written to. Either way, a
small batch of random data is run alone and with tails that spread (NaN, huge numbers), and compared.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.fx

from piecework.closeness import same_values
from piecework.codegen.graph.origin import source_line, value_of
from piecework.runtime import torch_compat
from piecework.runtime.batch.dispatcher import Reason
from piecework.runtime.graphs.plan.batch_shape import BatchShape, StagedInput
from piecework.runtime.graphs.stage.inputs import Number
from piecework.runtime.splitting_op import registry

Run = Callable[[Sequence[torch.Tensor], int], Sequence[object]]
# What takes a tensor for its shape, dtype and device alone, also as ``zeros_like`` or ``new_zeros``.
_OF_SHAPE = ("empty", "zeros", "ones", "full")


# --- what the graph shows ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NotPadded:
    """Why no batch is padded: the reason that coverage gives, and the whole of it in words."""

    reason: Reason
    text: str


def never_padded(shape: BatchShape) -> str | None:
    """Which result only a batch of the captured size has, if there is one."""
    number = next((n for n, rule in enumerate(shape.results) if rule.computed), None)
    return None if number is None else f"result {number}: its size is computed from the batch size"


def mixing(
    split_gm: torch.fx.GraphModule, shape: BatchShape, state: Collection[str]
) -> NotPadded | None:
    """What forbids to pad where nobody said that rows are independent, as a try may miss it.

    Args:
        state: the model's tensors that the graph writes to, by path.
    """
    for node in _calls(split_gm):
        declared = _declared(node)
        if declared is None:
            text = f"{_told(node)} does not say what it does with rows"
            return NotPadded(Reason.NOT_EXACT, text)
        if declared != "context" and _loses_rows(node, shape.symbols):
            return NotPadded(Reason.NOT_EXACT, f"{_told(node)} makes one value of all rows")
    if reads_context(split_gm):
        text = "an operator reads the batch's real size from the forward context: say pad=True"
        return NotPadded(Reason.NOT_EXACT, text)
    written = [*state, *(each.name for each in shape.staged if each.written and each.dim is None)]
    if written:
        text = f"{written[0]} is written to, and would keep rows beyond the batch"
        return NotPadded(Reason.NOT_EXACT, text)
    return None


def reads_context(split_gm: torch.fx.GraphModule) -> bool:
    """Whether an operator reads the batch's real size from the forward context."""
    return any(_declared(node) == "context" for node in _calls(split_gm))


def _calls(split_gm: torch.fx.GraphModule) -> Iterator[torch.fx.Node]:
    """All calls of functions and methods in the submodules, and in higher-order operators."""
    for module in split_gm.modules():
        if isinstance(module, torch.fx.GraphModule) and module is not split_gm:
            yield from (n for n in module.graph.nodes if n.op in ("call_function", "call_method"))


def _declared(node: torch.fx.Node) -> str | None:
    """What an operator says of its rows; "" for torch's own, which the try looks at."""
    target = node.target
    if isinstance(target, torch._ops.OpOverloadPacket):
        target = getattr(target, target.overloads()[0])
    if not isinstance(target, torch._ops.OpOverload):
        return ""
    return "" if target.namespace in ("aten", "prims", "prim") else registry.rows_of(target)


def _loses_rows(node: torch.fx.Node, symbols: Collection[str]) -> bool:
    """Whether a tensor without rows is made of the values of one that has rows."""
    taken = [value_of(each) for each in node.all_input_nodes]
    if _name(node).removeprefix("new_").startswith(_OF_SHAPE) or (
        node.target is operator.getitem and not isinstance(taken[0], torch.Tensor)
    ):
        return False

    def has_rows(tensor: torch.Tensor) -> bool:
        return any(not set(torch_compat.symbols_in(n)).isdisjoint(symbols) for n in tensor.shape)

    made = _tensors(value_of(node))
    return any(map(has_rows, _tensors(taken))) and not all(map(has_rows, made))


def _tensors(value: object) -> list[torch.Tensor]:
    return [t for t in torch_compat.flatten_tree(value)[0] if isinstance(t, torch.Tensor)]


def _name(node: torch.fx.Node) -> str:
    """``sum`` for ``torch.sum`` and ``Tensor.sum``; ``embedding`` for ``aten.embedding.default``."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return str(name).partition(".")[0]


def _told(node: torch.fx.Node) -> str:
    line = source_line(node)
    return f"{_name(node)} ({line})" if line else _name(node)


# --- the try -------------------------------------------------------------------------------------------


class _Data(NamedTuple):
    """What one try is made of; None: random numbers, which are 0 and 1 where they are whole.

    Whole numbers of the batch; floating values behind it; whole numbers behind it; and whether the
    tail is what calls are padded with.
    """

    whole: int | None
    tail: float | None
    whole_tail: int | None
    as_served: bool = False


_TRIES = (
    _Data(None, None, None, as_served=True),
    _Data(0, math.nan, 1),
    _Data(1, 1e4, 0),
    _Data(None, -1e4, None),
)


def padded_difference(
    shape: BatchShape,
    sizes: Sequence[int],
    others: Mapping[str, int],
    pads: Mapping[str, Number],
    run: Run,
) -> str | None:
    """Which result of a small batch is another one where the batch is padded, if one is.

    ``run`` runs the model uncaptured on tensors of a batch of a size, and what it raises goes on;
    ``pads`` fills tails, by the input's name, and 0 others.
    """
    chosen = _sizes_to_try(shape, sizes, others)
    if chosen is None:
        return None
    count, padded = chosen
    found: list[str | None] = []
    for data in _TRIES:  # all of them: ranks that run together make as many forwards each
        rows = [_drawn(x, x.sizes(count, others), None, data.whole, seed=0) for x in shape.staged]
        pairs = zip(rows, shape.staged, strict=True)
        tails = [_with_tail(x, each, padded - count, data, pads) for x, each in pairs]
        alone, beside = run(rows, count), run(tails, padded)
        found.append(_difference(shape, count, (alone, rows), (beside, tails)))
    return next((each for each in found if each is not None), None)


def _difference(
    shape: BatchShape,
    count: int,
    alone: tuple[Sequence[object], Sequence[torch.Tensor]],
    padded: tuple[Sequence[object], Sequence[torch.Tensor]],
) -> str | None:
    for index, rule in enumerate(shape.results):
        if rule.is_count or rule.computed:
            continue
        if not same_values(alone[0][index], _front(padded[0][index], rule.dims, count)):
            return f"result {index}"
    for number, each in enumerate(shape.staged):
        dims = () if each.dim is None else (each.dim,)
        if each.written and not same_values(
            alone[1][number], _front(padded[1][number], dims, count)
        ):
            return f"argument {each.name}, which is written to,"
    return None


def _sizes_to_try(
    shape: BatchShape, sizes: Sequence[int], others: Mapping[str, int]
) -> tuple[int, int] | None:
    """A batch, and a captured size of about twice as many rows: what mixes them differs most."""
    for padded in sorted(sizes, key=lambda size: (size < 3, size)):
        counts = range(max(shape.low, 1), padded)
        for count in sorted(counts, key=lambda n: (n < 2, abs(n - padded // 2))):
            if shape.refusal(count, others) is None:
                return count, padded
    return None


def _front(value: object, dims: Sequence[int], count: int) -> object:
    if isinstance(value, torch.Tensor):
        for dim in dims:
            value = value.narrow(dim, 0, count)
    return value


def _with_tail(
    rows: torch.Tensor, each: StagedInput, more: int, data: _Data, pads: Mapping[str, Number]
) -> torch.Tensor:
    """The rows with ``more`` behind them; what the caller pads with is said to be right."""
    if each.dim is None:
        return rows.clone()
    shape = list(rows.shape)
    shape[each.dim] = more
    if data.as_served or each.name in pads:
        tail = rows.new_full(shape, pads.get(each.name, 0))
    else:
        tail = _drawn(each, shape, data.tail, data.whole_tail, seed=1)
    return torch.cat([rows, tail], each.dim)


def _drawn(
    each: StagedInput, shape: Sequence[int], value: float | None, whole: int | None, *, seed: int
) -> torch.Tensor:
    """Numbers of an input's dtype: one of them everywhere, or random ones."""
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if not (each.fake.dtype.is_floating_point or each.fake.dtype.is_complex):
        drawn = (drawn > 0).float() if whole is None else drawn.fill_(whole)
    elif value is not None:
        drawn = drawn.fill_(value)
    return drawn.to(each.fake.device, each.fake.dtype)


# --- on an accelerator -----------------------------------------------------------------------------------

_INDEXING = ("index", "gather", "scatter", "take", "getitem", "setitem", "embedding", "one_hot")
# Whole numbers that point at something whatever the floats are, or that do not come from them.
_POINT_INSIDE = (*_OF_SHAPE, "arg", "topk", "sort", "max", "min", "searchsorted", "bucketize")


def may_point_beyond(split_gm: torch.fx.GraphModule) -> str | None:
    """The operator for which made-up data may point beyond a table; None if there is none.

    A CPU raises there; on a GPU it ends the process's use of the device. Whole numbers that are
    drawn are 0 and 1, so a table of two rows is safe; those that are made of floats can be any.
    """
    for node in _calls(split_gm):
        name = _name(node)
        taken = _tensors([value_of(each) for each in node.all_input_nodes])
        floats = [each for each in taken if each.is_floating_point()]
        indexes = any(each in name for each in _INDEXING)
        makes = any(map(_is_whole, _tensors(value_of(node)))) and not indexes
        if floats and makes and not name.removeprefix("new_").startswith(_POINT_INSIDE):
            return f"{_told(node)} makes whole numbers of floats"
        single = any(type(n) is int and n < 2 for each in floats for n in each.shape)
        if indexes and any(map(_is_whole, taken)) and single:
            return f"{_told(node)} may index a single row"
    return None


def _is_whole(tensor: torch.Tensor) -> bool:
    inexact = tensor.is_floating_point() or tensor.is_complex()
    return not inexact and tensor.dtype is not torch.bool
