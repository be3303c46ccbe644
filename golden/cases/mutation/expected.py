# piecework stitching source, format 1

import torch
import operator


def execution_fn(x, n, *, __vllm_submods__):
    clone = x.clone()
    getitem = clone[:n]
    iadd = operator.iadd(getitem, 1)
    del getitem
    operator.setitem(clone, 0, -5.0)
    operator.setitem(clone, (slice(1, n, None), 0), 7.0)
    torch.mul(clone, 2, out=clone)
    list_1 = list((1, n))
    operator.setitem(list_1, 0, n)
    sum_1 = torch.sum(iadd)
    return (clone, iadd, sum_1, list_1, x)
