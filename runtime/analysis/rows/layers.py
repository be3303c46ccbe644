"""Normalisation, convolution, pooling, resizing and padding. In: calls. Out: rows of their results.

Convolutions take batches in dimension 0 and mix all other dimensions; pooling, resizing and padding treat each plane of the last
dimensions by itself.
"""

from __future__ import annotations

import torch

from piecework.runtime.analysis.rows.call import Call, placed
from piecework.runtime.analysis.rows.rule import Rule, rules
from piecework.runtime.analysis.state import SAME, Mixes, Rows

_TOGETHER = "takes all rows together"


def layer_norm(call: Call) -> Rows:
    """Over the last dimensions; the statistics keep the others."""
    call.same("weight", "bias")
    shape, rows = call.args["normalized_shape"], call.rows("self")
    assert isinstance(shape, (list, tuple))
    rank = call.tensor("self").dim()
    placed(range(rank - len(shape), rank), rows, _TOGETHER)
    return rows


def group_norm(call: Call) -> list[Rows]:
    """``[N, C, …]``: each element of ``N`` by itself."""
    call.same("weight", "bias")
    rows = call.rows("self")
    placed(range(1, call.tensor("self").dim()), rows, _TOGETHER)
    if not isinstance(call.args["N"], torch.SymInt):
        raise Mixes(_TOGETHER)
    return [rows] * len(call.results)


def batch_norm(call: Call) -> list[Rows]:
    """``[N, C, …]``: with fixed statistics each element by itself; else each channel."""
    rows, rank = call.rows("self"), call.tensor("self").dim()
    if call.args.get("training", "update" in call.name or "no_training" not in call.name):
        placed([dim for dim in range(rank) if dim != 1], rows, _TOGETHER)
    else:
        placed((1,), rows, "normalises each row by itself, with fixed statistics")
    for name in ("weight", "bias", "running_mean", "running_var"):
        if call.rows(name).dims not in ({}, rows.moved({1: 0}).dims if rows.at(1) else {}):
            raise Mixes("takes rows as statistics")
    statistics = rows.moved({1: 0}) if rows.at(1) else SAME
    return [rows, *[statistics] * (len(call.results) - 1)]


def convolution(call: Call) -> Rows:
    """``[N, C, …]`` with a fixed weight of the same rank."""
    call.same("weight", "bias")
    rank = call.tensor("self").dim()
    placed(range(1, rank), call.rows("self"), "convolves over the rows")
    if rank != call.tensor("weight").dim():
        raise Mixes("takes an input without a batch")
    return call.rows("self")


def by_plane(call: Call) -> list[Rows]:
    """Works on the last dimensions, as many as its name says; what lies before them stays apart."""
    count = next(int(each) for each in call.name if each.isdigit())
    rank, rows = call.tensor("self").dim(), call.rows("self")
    placed(range(rank - count, rank), rows, _TOGETHER)
    return [rows] * len(call.results)


def padded(call: Call) -> Rows:
    """``constant_pad_nd``: pairs from the last dimension on."""
    pads, rows = call.args["pad"], call.rows("self")
    assert isinstance(pads, (list, tuple))
    rank = call.tensor("self").dim()
    for index in range(len(pads) // 2):
        if rows.at(rank - 1 - index) and list(pads[2 * index : 2 * index + 2]) != [0, 0]:
            raise Mixes("puts elements before or behind the rows")
    return rows


def in_batch(call: Call) -> Rows:
    """A batch in dimension 0 of every argument that has one; all other dimensions are mixed."""
    tensors = call.inputs()
    if any(set(call.state_of(each).dims) - {0} for each in tensors):
        raise Mixes(_TOGETHER)
    carrying = [each for each in tensors if call.state_of(each).dims]
    sizes = {str(each.shape[0]) for each in carrying}
    if len(sizes) != 1 or any(each.dim() != 4 for each in carrying):
        raise Mixes("takes arguments with and without a batch")
    if len(carrying) != len(tensors):
        raise Mixes("takes one argument for all rows")
    states = [call.state_of(each) for each in carrying]
    return states[0] if all(s == states[0] for s in states) else Rows(mixed=_TOGETHER)


def patches(call: Call) -> Rows:
    """``im2col`` and back: ``[N, …]`` with a batch in front."""
    rank = {"im2col": 4, "col2im": 3}[call.name]
    if call.tensor("self").dim() != rank:
        raise Mixes("takes an input without a batch")
    placed(range(1, rank), call.rows("self"), _TOGETHER)
    return call.rows("self")


_PLANES = (
    "avg_pool1d avg_pool2d avg_pool3d max_pool2d_with_indices max_pool3d_with_indices max_pool1d max_pool2d max_pool3d "
    "_adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_avg_pool1d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d "
    "upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d "
    "_upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d "
    "_upsample_bilinear2d_aa _upsample_bicubic2d_aa reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d "
    "replication_pad2d replication_pad3d"
)

RULES: dict[str, Rule] = {
    **rules("native_layer_norm _fused_rms_norm rms_norm", layer_norm, plain=True),
    **rules("native_group_norm", group_norm, sizes=("N",)),
    **rules(
        "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm",
        batch_norm,
    ),
    **rules("convolution", convolution),
    **rules(_PLANES, by_plane),
    **rules("constant_pad_nd", padded),
    **rules("grid_sampler_2d", in_batch),
    **rules("im2col col2im", patches),
}
