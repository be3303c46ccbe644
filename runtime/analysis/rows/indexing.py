"""Operators that pick elements by numbers that tensors hold. In: calls. Out: rows of their results.

Numbers may carry rows where what they point into is the same for all; and rows may be picked from in their other dimensions. A
number that points at rows points at its own only where it is the number of its row, out of an ``arange`` of the batch.
"""

from __future__ import annotations

import torch

from piecework.runtime.analysis.rows.call import Call, placed
from piecework.runtime.analysis.rows.rule import Rule, rules
from piecework.runtime.analysis.state import Mixes, Rows, same_sizes, tensors_in, union

_POINTS = "picks rows by number"


def embedding(call: Call) -> Rows:
    call.same("weight")
    return call.rows("indices")


def index_select(call: Call) -> Rows:
    dim, rows = call.dim(), call.rows("self")
    placed((dim,), rows, _POINTS)
    if call.tensor("self").dim() == 0:
        raise Mixes(_POINTS)
    return union(rows, call.rows("index").shifted(dim) if call.tensor("index").dim() else Rows())


def gather(call: Call) -> Rows:
    """Each element by its own number: rows of both go together."""
    dim, rows, index = call.dim(), call.rows("self"), call.rows("index")
    placed((dim,), rows, _POINTS)
    if set(rows.dims) - set(index.dims):
        raise Mixes("takes some of the rows")
    return union(rows, index)


def scatter(call: Call) -> Rows:
    dim, rows = call.dim(), call.rows("self")
    placed((dim,), rows, "writes to rows by number")
    for name in ("index", "src"):
        if call.has(name):
            pair = (call.tensor("self"), call.tensor(name))
            if call.rows(name).dims != rows.dims or not same_sizes(pair, rows.dims):
                raise Mixes("writes rows to where the batch has none")
    return rows


def index_write(call: Call) -> Rows:
    """``index_add``, ``index_copy`` and ``index_fill``: whole lines at fixed places of another dimension."""
    call.same("index", "value")
    dim, rows = call.dim(), call.rows("self")
    placed((dim,), rows, "writes to rows by number")
    source = call.rows("source")
    if call.has("source") and call.tensor("source").dim() != call.tensor("self").dim():
        raise Mixes("writes a single element")
    placed((dim,), source, "writes rows elsewhere")
    return union(rows, source)


def index(call: Call) -> Rows:
    """``x[a, :, b]``: dimensions that are taken whole keep their rows, and the numbers' own dimensions come where they stand
    together, else in front.
    """
    indices = call.args["indices"]
    assert isinstance(indices, (list, tuple))
    return _indexed(call, list(indices), call.results[0].dim())


def _indexed(call: Call, indices: list[object], rank: int) -> Rows:
    tensor, rows = call.tensor("self"), call.rows("self")
    picked = [d for d, each in enumerate(indices) if isinstance(each, torch.Tensor)]
    numbers = list(tensors_in(indices))
    if any(each.dtype in (torch.bool, torch.uint8) for each in numbers):
        raise Mixes("takes as many elements as a mask says")
    for dim in picked:
        if rows.at(dim) and not (rows.dims[dim] == 1 and call.state_of(indices[dim]).numbers):  # type: ignore[arg-type]
            raise Mixes(_POINTS)
    width = max((each.dim() for each in numbers), default=0)
    whole = [d for d in range(tensor.dim()) if d not in picked]
    together = bool(picked) and picked == list(range(picked[0], picked[0] + len(picked)))
    front = sum(d < picked[0] for d in whole) if together else 0
    place = {d: n + (width if n >= front else 0) for n, d in enumerate(whole)}
    if rank != len(whole) + width:
        raise Mixes("takes elements in a way that is not known")
    states = [call.state_of(each).shifted(front + width - each.dim()) for each in numbers]
    left = Rows({d: blocks for d, blocks in rows.dims.items() if d not in picked})
    return union(left.moved(place), *states)


def index_put(call: Call) -> Rows:
    """Values at fixed places, in dimensions other than the rows'."""
    indices = call.args["indices"]
    assert isinstance(indices, (list, tuple))
    call.same("indices")
    numbers = list(tensors_in(indices))
    width = max((each.dim() for each in numbers), default=0)
    rank = call.tensor("self").dim() - len(numbers) + width
    target = _indexed(call, list(indices), rank)
    values = call.rows("values").shifted(rank - call.tensor("values").dim())
    if any(target.dims.get(dim) != blocks for dim, blocks in values.dims.items()):
        raise Mixes("writes rows to where the batch has none")
    return call.rows("self")


RULES: dict[str, Rule] = {
    **rules("embedding", embedding, plain=True),
    **rules("index_select", index_select, plain=True),
    **rules("gather", gather),
    **rules("scatter scatter_add scatter_reduce", scatter),
    **rules("index_add index_copy index_fill", index_write),
    **rules("index _unsafe_index", index),
    **rules("index_put _unsafe_index_put", index_put),
}
