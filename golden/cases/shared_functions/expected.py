# piecework stitching source, format 1

import torch


def layer_0(x_0, literal, literal_1):
    # shared by 3 submodules
    mul = torch.mul(x_0, literal)
    getitem, unused = mul.chunk(2, dim=0)
    del mul, unused
    full_like = torch.full_like(x_0, literal_1)
    add = torch.add(full_like, True, alpha=2)
    del full_like
    return (getitem, add)


def layer_2(x_2):
    mul = torch.mul(x_2, 2.0)
    getitem, unused, unused_1 = mul.chunk(3, dim=0)
    del mul, unused, unused_1
    full_like = torch.full_like(x_2, 2)
    add = torch.add(full_like, True, alpha=2)
    del full_like
    return (getitem, add)


def execution_fn(x, *, __vllm_submods__):
    getitem, getitem_1 = layer_0(x, 0.0, 0)
    getitem_2, getitem_3 = layer_0(getitem_1, 1.0, 1)
    del getitem_1
    getitem_4, getitem_5 = layer_2(getitem_3)
    del getitem_3
    getitem_6, getitem_7 = layer_0(getitem_5, 3.0, 3)
    del getitem_5
    return (getitem_7, [getitem, getitem_2, getitem_4, getitem_6])
