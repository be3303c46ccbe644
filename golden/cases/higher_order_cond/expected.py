# piecework stitching source, format 1
#
# __vllm_consts__:
#   [0] module GraphModule from cond_true_0
#   [1] module GraphModule from cond_false_0

import torch


def execution_fn(x, *, __vllm_submods__):
    sum_1 = x.sum()
    gt = sum_1.gt(0)
    del sum_1
    cond = torch.ops.higher_order.cond(gt, __vllm_consts__[0], __vllm_consts__[1], (x,))
    del gt
    getitem = cond[0]
    del cond
    return (getitem,)
