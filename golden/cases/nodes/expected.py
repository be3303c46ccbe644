# piecework stitching source, format 1
#
# __vllm_consts__:
#   [0] torch.float64
#   [1] float nan
#   [2] float inf

import torch
import math
import operator


def execution_fn(x, scale=2.0, *, __vllm_submods__):
    matmul = x @ x
    add = matmul + (-1)
    del matmul
    iadd = operator.iadd(add, scale)
    del add
    neg = -iadd
    del iadd
    getattr_1 = neg.shape
    getitem = getattr_1[0]
    del getattr_1
    sqrt = math.sqrt(getitem)
    slice_1 = slice(0, getitem, 2)
    del getitem
    getitem_1 = neg[slice_1, None, ...]
    del neg, slice_1
    transpose = getitem_1.transpose(-1, -2)
    del getitem_1
    to = transpose.to(dtype=__vllm_consts__[0], copy=True)
    del transpose
    sum_dim_int_list = torch.ops.aten.sum.dim_IntList(to, [-1], keepdim=False)
    del to
    len_1 = len('"""\\\n\u2603{}')
    return {
        "result": (sum_dim_int_list, sqrt),
        "text": len_1,
        "values": (__vllm_consts__[1], __vllm_consts__[2], -0.0, 1j, (2,), True, b"\x00"),
    }
