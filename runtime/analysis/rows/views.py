"""Operators that move elements and compute nothing. In: calls. Out: rows of their results.

`reshaped` is the heart: rows stay rows as long as what lies before them in the order of elements can still be told apart.
"""

from __future__ import annotations

import sys

from piecework.runtime import torch_compat
from piecework.runtime.analysis.rows.call import Call, placed
from piecework.runtime.analysis.rows.rule import Rule, rules
from piecework.runtime.analysis.state import SAME, Mixes, Rows, is_whole, product, union


def reshaped(call: Call) -> Rows:
    """``view``, ``reshape`` and kin.

    Rows lie ``before`` blocks deep in the order of elements: all sizes in front of their dimension, times the blocks inside it. In the
    new shape the same number must come out, and what is left of it behind the sizes in front are the new blocks.
    """
    if "dtype" in call.args:
        return _as_dtype(call)
    old, new = call.tensor("self"), call.results[0]
    rows, places = call.rows("self"), call.batch.dims_of(new)
    if len(places) != len(rows.dims):
        raise Mixes("deals rows out anew")
    dims: dict[int, object] = {}
    for (dim, blocks), place in zip(sorted(rows.dims.items()), places, strict=True):
        factor = call.batch.factor(new.shape[place])
        before = product(old.shape[:dim]) * torch_compat.size_expr(blocks)
        in_front = product(new.shape[:place])
        if in_front == 0:
            raise Mixes("deals rows out anew")
        left = before / in_front
        if factor is None or not is_whole(left) or not is_whole(factor / left):  # type: ignore[operator]
            raise Mixes("deals rows out anew")
        if any(str(each) in call.batch.symbols for each in left.free_symbols):
            raise Mixes("deals rows out anew")
        dims[place] = left
    return Rows(dims).still_numbers(rows)


def _as_dtype(call: Call) -> Rows:
    rows, tensor = call.rows("self"), call.tensor("self")
    if tensor.element_size() != call.results[0].element_size():
        placed((tensor.dim() - 1,), rows, "makes one element of several rows")
    return rows


def permuted(call: Call) -> Rows:
    rank = call.tensor("self").dim()
    order = list(range(rank))
    if call.name == "permute":
        order = [call.front(int(dim), rank) for dim in call.args["dims"]]  # type: ignore[attr-defined]
    elif call.name == "t":
        order = order[::-1]
    else:
        first, second = call.dim("dim0"), call.dim("dim1")
        order[first], order[second] = second, first
    return call.rows("self").moved({old: new for new, old in enumerate(order)})


def unsqueezed(call: Call) -> Rows:
    at = call.front(call.number("dim"), call.tensor("self").dim() + 1)
    rows = call.rows("self")
    moved = rows.moved({d: d + (d >= at) for d in range(call.tensor("self").dim())})
    return moved.still_numbers(rows)


def squeezed(call: Call) -> Rows:
    """Drops dimensions of one; a batch is none, also where it happens to be."""
    old, rows = call.tensor("self"), call.rows("self")
    asked = call.dims("dim") if "dim" in call.args else tuple(range(old.dim()))
    asked = () if asked is None else asked
    if "dim" in call.args:
        placed(asked, rows, "drops the batch where it is one row")
    gone = {dim for dim in asked if type(old.shape[dim]) is int and old.shape[dim] == 1}
    if len(gone) != old.dim() - call.results[0].dim():
        raise Mixes("drops dimensions that may be one")
    kept = [dim for dim in range(old.dim()) if dim not in gone]
    return rows.moved({old_dim: new for new, old_dim in enumerate(kept)})


def expanded(call: Call) -> Rows:
    """Dimensions of one, and new ones in front, become the size that is asked for."""
    old, new = call.tensor("self"), call.results[0]
    by = new.dim() - old.dim()
    rows = call.rows("self").shifted(by)
    grown = {
        dim: 1
        for dim in call.batch.dims_of(new)
        if dim < by or not call.batch.held_by(old.shape[dim - by])
    }
    return union(rows, Rows(grown)).still_numbers(call.rows("self"))


def repeated(call: Call) -> Rows:
    """Copies stand behind one another: rows along a dimension that is repeated are in order in its first copy alone."""
    old, new = call.tensor("self"), call.results[0]
    by = new.dim() - old.dim()
    repeats = call.args["repeats"]
    assert isinstance(repeats, (list, tuple))
    rows = call.rows("self").shifted(by)
    dims: dict[int, object] = dict(rows.dims)
    for dim, times in enumerate(repeats):
        if rows.at(dim) and not (type(times) is int and times == 1):
            raise Mixes("repeats rows behind one another")
        if call.batch.held_by(times):
            dims[dim] = 1
    return Rows(dims)


def sliced(call: Call) -> Rows:
    """All rows, or elements of other dimensions; or the first of a fixed table, as many as the batch has."""
    old, dim = call.tensor("self"), call.dim()
    rows, end = call.rows("self"), call.args.get("end")
    if rows.at(dim):
        if not _is_whole_slice(call, old.shape[dim]):
            raise Mixes("takes some of the rows")
        return rows
    if call.batch.held_by(end):
        return union(rows, Rows({dim: 1}))
    return rows


def _is_whole_slice(call: Call, size: object) -> bool:
    start, end, step = call.args.get("start"), call.args.get("end"), call.args.get("step", 1)
    if not (start is None or (type(start) is int and start == 0)) or step != 1:
        return False
    if end is None or (type(end) is int and end == sys.maxsize):
        return True
    return bool(torch_compat.size_expr(end) == torch_compat.size_expr(size))


def selected(call: Call) -> Rows:
    dim, rows = call.dim(), call.rows("self")
    placed((dim,), rows, "takes one row")
    return rows.moved({d: d - (d > dim) for d in range(call.tensor("self").dim()) if d != dim})


def unbound(call: Call) -> list[Rows]:
    return [selected(call)] * len(call.results)


def parted(call: Call) -> list[Rows]:
    """``split`` and kin: parts along another dimension."""
    rows = call.rows("self")
    placed((call.dim(),), rows, "parts the rows")
    return [rows] * len(call.results)


def unfolded(call: Call) -> Rows:
    rows = call.rows("self")
    placed((call.dim("dimension"),), rows, "takes several rows together")
    return rows


def diagonal(call: Call) -> Rows:
    rank = call.tensor("self").dim()
    pair = {call.dim("dim1"), call.dim("dim2")}
    rows = call.rows("self")
    placed(pair, rows, "takes another element of each row")
    kept = [dim for dim in range(rank) if dim not in pair]
    return rows.moved({old: new for new, old in enumerate(kept)})


def joined(call: Call) -> Rows:
    """``cat`` along another dimension than the rows'."""
    tensors = call.tensors("tensors")
    rank = call.results[0].dim()
    dim = call.front(call.number("dim"), rank)
    whole = [t for t in tensors if t.dim() == rank]
    if any(t.dim() != 1 or t.shape[0] != 0 for t in tensors if t.dim() != rank):
        raise Mixes("joins tensors of different ranks")
    states = [call.state_of(each) for each in whole]
    for state in states:
        placed((dim,), state, "joins behind the rows")
    return union(*states)


def stacked(call: Call) -> Rows:
    rank = call.results[0].dim()
    dim = call.front(call.number("dim"), rank)
    states = [call.state_of(each) for each in call.tensors("tensors")]
    return union(*states).moved({d: d + (d >= dim) for d in range(rank - 1)})


def scattered(call: Call) -> Rows:
    """``select_scatter`` and ``slice_scatter`` into another dimension than the rows'."""
    dim, rows, source = call.dim(), call.rows("self"), call.rows("src")
    placed((dim,), rows, "writes to some of the rows")
    placed((dim,), source if call.name == "slice_scatter" else SAME, "writes rows elsewhere")
    if call.name == "select_scatter":
        rank = call.tensor("self").dim()
        source = source.moved({d: d + (d >= dim) for d in range(rank - 1)})
    return union(rows, source)


def shuffled_pixels(call: Call) -> Rows:
    """``pixel_shuffle`` and kin work on the last three dimensions."""
    rank, rows = call.tensor("self").dim(), call.rows("self")
    placed(range(rank - 3, rank), rows, "moves rows")
    return rows


_VIEW = "view reshape _unsafe_view _reshape_alias view_copy"

RULES: dict[str, Rule] = {
    **rules(_VIEW, reshaped, sizes=("size", "stride", "shape"), plain=True, numbers=True),
    **rules("permute transpose t", permuted, plain=True),
    **rules("unsqueeze", unsqueezed, plain=True, numbers=True),
    **rules("squeeze", squeezed, plain=True),
    **rules("expand", expanded, sizes=("size",), plain=True, numbers=True),
    **rules("repeat", repeated, sizes=("repeats",)),
    **rules("slice", sliced, sizes=("end",), plain=True, numbers=True),
    **rules("select", selected, plain=True),
    **rules("unbind", unbound, plain=True),
    **rules(
        "split split_with_sizes unsafe_split unsafe_split_with_sizes chunk", parted, plain=True
    ),
    **rules("unfold", unfolded),
    **rules("diagonal", diagonal),
    **rules("cat concat", joined, plain=True),
    **rules("stack", stacked, plain=True),
    **rules("select_scatter slice_scatter", scattered, sizes=("end",)),
    **rules("pixel_shuffle pixel_unshuffle channel_shuffle", shuffled_pixels),
}
