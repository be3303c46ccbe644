"""Products and distances. In: calls. Out: rows of their results.

Rows may be in any dimension that is not summed over; where matrices come in batches, those of both sides go together.
"""

from __future__ import annotations

import torch

from piecework.runtime.analysis.rows.call import Call, placed
from piecework.runtime.analysis.rows.rule import Rule, rules
from piecework.runtime.analysis.state import Mixes, Rows, same_sizes, union

_SUMS = "takes the product over the batch"


def product_of(call: Call) -> Rows:
    """``mm`` and ``bmm``."""
    return _times(call, call.tensor("self"), call.tensor("mat2"))


def product_and_sum(call: Call) -> Rows:
    """``addmm`` and ``baddbmm``: what is added is broadcast."""
    names = ("mat1", "mat2") if "mat1" in call.args else ("batch1", "batch2")
    rows = _times(call, call.tensor(names[0]), call.tensor(names[1]))
    by = call.results[0].dim() - call.tensor("self").dim()
    return union(rows, call.rows("self").shifted(by))


def _times(call: Call, left: torch.Tensor, right: torch.Tensor) -> Rows:
    """``[…, i, k] @ […, k, j]`` of the same rank."""
    rank = left.dim()
    one, other = call.state_of(left), call.state_of(right)
    placed((rank - 1,), one, _SUMS)
    placed((rank - 2,), other, _SUMS)
    return union(one, other)


def vector_product(call: Call) -> Rows:
    """``mv`` and ``addmv``."""
    matrix = call.tensor("mat" if "mat" in call.args else "self")
    rows = call.state_of(matrix)
    placed((1,), rows, _SUMS)
    placed((0,), call.rows("vec"), _SUMS)
    return union(rows, call.rows("self")) if "mat" in call.args else rows


def linear(call: Call) -> Rows:
    """Kernels for a linear layer: the last dimension is summed over, the weight is fixed."""
    call.same("weight", "bias", "mat2", "scales")
    tensor = call.tensor("self")
    placed((tensor.dim() - 1,), call.rows("self"), _SUMS)
    return call.rows("self")


def distances(call: Call) -> Rows:
    """``_cdist_forward``: ``[…, i, k]`` and ``[…, j, k]`` to ``[…, i, j]``."""
    left, right = call.tensor("x1"), call.tensor("x2")
    rank = call.results[0].dim()
    one = call.state_of(left)
    other = call.state_of(right)
    placed((left.dim() - 1,), one, _SUMS)
    placed((right.dim() - 1,), other, _SUMS)
    one = one.shifted(rank - left.dim())
    other = other.shifted(rank - right.dim())
    return union(one, other.moved({d: d + (d == rank - 2) for d in range(rank)}))


def attention(call: Call) -> list[Rows]:
    """Fused attention ``[batch, heads, length, width]``: rows in the batch or the heads; or in the lengths where each position sees
    those before it alone.
    """
    if call.args.get("dropout_p"):
        raise Mixes("draws random numbers")
    names = ("query", "key", "value")
    query, key, value = (call.rows(name) for name in names)
    rank = call.tensor("query").dim()
    for rows in (query, key, value):
        placed((rank - 1,), rows, _SUMS)
        if not call.args.get("is_causal") or rows.dims.get(rank - 2, 1) != 1:
            placed((rank - 2,), rows, "attends over the batch")
    found = union(query, key, value)
    if not same_sizes([call.tensor(name) for name in names], found.dims):
        raise Mixes("attends over the batch")
    for name in ("attn_mask", "attn_bias"):
        if call.has(name):
            by = rank - call.tensor(name).dim()
            mask = call.rows(name).shifted(by)
            placed((rank - 2, rank - 1), mask, "attends over the batch")
            found = union(found, mask)
    return [found, *[_statistics(call, found, each) for each in call.results[1:]]]


def _statistics(call: Call, found: Rows, result: torch.Tensor) -> Rows:
    """Other results than the attention's own: sums for each position, seeds, lengths."""
    dims = call.batch.dims_of(result)
    if dims == [0] and found.dims == {0: 1}:
        return found
    return Rows() if not dims else Rows(mixed="is a number of the attention kernel")


_ATTENTION = (
    "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_efficient_attention _scaled_dot_product_flash_attention "
    "_scaled_dot_product_cudnn_attention _scaled_dot_product_fused_attention_overrideable"
)

RULES: dict[str, Rule] = {
    **rules("mm bmm _int_mm", product_of, plain=True),
    **rules("addmm baddbmm", product_and_sum, plain=True),
    **rules("mv addmv", vector_product),
    **rules("linear mkldnn_linear _weight_int8pack_mm", linear, plain=True),
    **rules("_cdist_forward _euclidean_dist", distances),
    **rules(_ATTENTION, attention),
}
