"""Operators that work along dimensions: reductions, softmax, sorting, scans, transforms. In: calls. Out: rows of their results.

They keep rows apart along any dimension but the rows' own; running sums keep the first rows apart from those behind even there.
"""

from __future__ import annotations

from piecework.runtime.analysis.rows.call import Call, placed
from piecework.runtime.analysis.rows.rule import Rule, rules
from piecework.runtime.analysis.state import SAME, Mixes, Rows


def reduced(call: Call) -> Rows:
    """One number for each line along ``dim``; over everything where no dimension is given."""
    rows, rank = call.rows("self"), call.tensor("self").dim()
    dims = call.dims("dim") if "dim" in call.args else None
    if dims is None:
        dims = tuple(range(rank))
    placed(dims, rows, "takes all rows together")
    if call.args.get("keepdim"):
        return rows
    kept = [dim for dim in range(rank) if dim not in dims]
    return rows.moved({old: new for new, old in enumerate(kept)})


def along(call: Call) -> Rows:
    """As many elements as before, or fewer, along ``dim``."""
    rows = call.rows("self")
    dims = call.dims("dim") if call.args.get("dim") is not None else None
    if dims is None:
        raise Mixes("works over all dimensions")
    placed(dims, rows, "works along the batch")
    return rows


def along_several(call: Call) -> Rows:
    """``flip`` and ``roll``: along ``dims``, or over the flattened tensor where there are none."""
    rows, dims = call.rows("self"), call.dims("dims")
    if dims is None and rows.dims and call.name == "roll":
        raise Mixes("works along the batch")
    placed(dims or (), rows, "works along the batch")
    return rows


def running(call: Call) -> Rows:
    """``cumsum`` and kin: a row takes in those before it, and none behind."""
    rows, dim = call.rows("self"), call.dim()
    if rows.dims.get(dim, 1) != 1:
        raise Mixes("works along the batch")
    return rows


def transformed(call: Call) -> Rows:
    """Fourier transforms."""
    rows, dims = call.rows("self"), call.dims("dim")
    placed(dims or (), rows, "works along the batch")
    return rows


def by_matrix(call: Call) -> Rows:
    """Functions of matrices in the last two dimensions, each by itself."""
    tensor = call.inputs()[0]
    rows = call.state_of(tensor)
    placed((tensor.dim() - 2, tensor.dim() - 1), rows, "takes all rows together")
    for other in call.inputs()[1:]:
        if call.state_of(other) != SAME:
            raise Mixes("takes rows in several arguments")
    return rows


_REDUCED = "sum mean amax amin max min prod any all argmax argmin var std linalg_vector_norm median mode kthvalue"
_REDUCED_TOO = "var_mean std_mean logsumexp norm nanmedian count_nonzero nansum nanmean aminmax"

RULES: dict[str, Rule] = {
    **rules(_REDUCED, reduced, plain=True),
    **rules(_REDUCED_TOO, reduced),
    **rules("_softmax _log_softmax _safe_softmax softmax log_softmax", along, plain=True),
    **rules("sort argsort topk glu", along),
    **rules("flip roll", along_several),
    **rules("cumsum cumprod logcumsumexp cummax cummin", running),
    **rules("_fft_r2c _fft_c2r _fft_c2c", transformed),
    **rules("_linalg_det _linalg_slogdet linalg_matrix_exp", by_matrix),
}
