"""Operators that work element by element, and those that make tensors. In: calls. Out: rows of their results.

Elements meet by broadcasting: dimensions are counted from the back, and rows must meet the same rows or a single element.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from piecework.runtime.analysis.rows.call import Call
from piecework.runtime.analysis.rows.rule import Rule, rules
from piecework.runtime.analysis.state import SAME, Mixes, Rows, union


def pointwise(call: Call) -> Rows:
    return broadcast(call, call.inputs(), call.results[0].dim())


def broadcast(call: Call, tensors: Iterable[torch.Tensor], rank: int) -> Rows:
    """Rows of tensors that are broadcast to ``rank`` dimensions."""
    return union(*(call.state_of(each).shifted(rank - each.dim()) for each in tensors))


def made(call: Call) -> Rows:
    """Memory of a shape; what lies in it is the same everywhere, or nothing yet."""
    return call.batch.plain_rows(call.results[0])


def arange(call: Call) -> Rows:
    """Positions from a fixed start in fixed steps: those of the first rows stay where they are."""
    rows = made(call)
    plain = all(
        type(value) is int and value == usual
        for value, usual in ((call.args.get("start", 0), 0), (call.args.get("step", 1), 1))
    )
    whole = bool(rows.dims) and call.batch.factor(call.results[0].shape[0]) == 1
    return replace(rows, numbers=plain and whole and _counts(call))


def copied(call: Call) -> Rows:
    """The same elements, maybe of another dtype."""
    rows = call.rows("self")
    return rows.still_numbers(rows if _counts(call) else SAME)


def _counts(call: Call) -> bool:
    """Whether what comes out can count rows."""
    return call.results[0].dtype in (torch.int32, torch.int64)


def with_position(call: Call) -> Rows:
    """``tril`` and ``triu``: each element by itself and its position."""
    return call.rows("self")


def like(call: Call) -> Rows:
    """``zeros_like`` and kin: the shape of a tensor, whatever lies in it."""
    given = call.rows("self")
    return made(call) if given.mixed is not None else given


def filled(call: Call) -> Rows:
    """``fill``, ``zero`` and ``copy``: the shape of the first, the values of the second."""
    source = call.args.get("src", call.args.get("value"))
    if not isinstance(source, torch.Tensor):
        return call.rows("self")
    by = call.tensor("self").dim() - source.dim()
    return union(call.rows("self"), call.state_of(source).shifted(by))


def sorted_into(call: Call) -> Rows:
    """``bucketize`` and ``searchsorted``: each element by itself, among fixed borders in one dimension."""
    call.same("boundaries", "sorted_sequence", "sorter")
    borders = call.args.get("boundaries", call.args.get("sorted_sequence"))
    if not isinstance(borders, torch.Tensor) or borders.dim() != 1:
        raise Mixes("looks up in borders of several dimensions")
    return call.rows("self")


def is_in(call: Call) -> Rows:
    call.same("test_elements")
    return call.rows("elements")


def complex_parts(call: Call) -> Rows:
    """``view_as_real`` and back: a dimension of two behind all others."""
    if call.name == "view_as_complex":
        rows = call.rows("self")
        if rows.at(call.tensor("self").dim() - 1):
            raise Mixes("makes one number of two rows")
        return rows
    return call.rows("self")


#: By name, for those that torch does not tag as pointwise.
_UNTAGGED = (
    "lift lift_fresh lift_fresh_copy masked_fill _conj _neg_view resolve_conj resolve_neg real imag "
    "_prelu_kernel complex polar lerp where isclose log_sigmoid_forward positive conj contiguous square "
    "special_entr special_i0e special_i1e special_log_ndtr xlogy special_xlog1py logit nan_to_num hardswish floor_divide"
)
_MADE = "empty zeros ones empty_strided empty_permuted new_empty new_zeros new_ones new_empty_strided eye scalar_tensor"
_LIKE = "empty_like zeros_like ones_like full_like"
_SHAPE = ("size", "stride", "n", "m", "physical_layout")

POINTWISE = Rule(pointwise, plain=True)
RULES: dict[str, Rule] = {
    **rules(_UNTAGGED, pointwise, plain=True),
    **rules(_MADE, made, sizes=_SHAPE, reads=False, plain=True),
    **rules("full new_full", made, sizes=_SHAPE, reads=False, plain=True),
    **rules(_LIKE, like, reads=False, plain=True),
    **rules("_to_copy alias clone detach", copied, plain=True, numbers=True),
    **rules("arange", arange, sizes=("end",), plain=True, numbers=True),
    **rules("tril triu", with_position),
    **rules("copy fill zero", filled, plain=True),
    **rules("bucketize searchsorted", sorted_into),
    **rules("isin", is_in),
    **rules("view_as_real view_as_complex", complex_parts),
}

#: Tagged as pointwise, and not so for us: it answers with one number.
NOT_POINTWISE = frozenset(("equal",))
