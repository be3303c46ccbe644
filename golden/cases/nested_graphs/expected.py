# piecework stitching source, format 1
#
# __vllm_submods__:
#   [0] outer.act
#   [1] other.act

import torch


def outer_inner(a, b):
    # shared by 2 submodules
    add = torch.add(a, b)
    sub = torch.sub(a, b)
    return (add, sub)


def outer(x, *, __vllm_submods__):
    getitem, getitem_1 = outer_inner(x, 1)
    act = __vllm_submods__[0](input=getitem_1)
    del getitem_1
    return [getitem, act]


def other(x, *, __vllm_submods__):
    getitem, getitem_1 = outer_inner(x, 1)
    act = __vllm_submods__[1](input=getitem_1)
    del getitem_1
    return [getitem, act]


def execution_fn(x, *, __vllm_submods__):
    outer_1 = outer(x, __vllm_submods__=__vllm_submods__)
    outer_1_1 = outer(x, __vllm_submods__=__vllm_submods__)
    other_1 = other(x, __vllm_submods__=__vllm_submods__)
    return (outer_1, outer_1_1, other_1)
