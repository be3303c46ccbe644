# piecework stitching source, format 1

import torch


def execution_fn(x, *, __vllm_submods__):
    getitem, getitem_1 = torch.chunk(x, 2)
    unused, getitem_2, unused_1 = torch.split(x, 2)
    del unused, unused_1
    getitem_3, unused_2 = torch.ops.aten.aminmax.default(x, dim=0)
    del unused_2
    unbind = x.unbind()
    getitem_4 = unbind[-1]
    len_1 = len(unbind)
    del unbind
    return (getitem, getitem_1, getitem_2, getitem_3, getitem_4, len_1, getitem)
