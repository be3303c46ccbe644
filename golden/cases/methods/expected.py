# piecework stitching source, format 1
#
# __vllm_consts__:
#   [0] tensor f32[2, 3] from table

import torch


def execution_fn(x, *, __vllm_submods__):
    select = __vllm_consts__[0].select(0, 1)
    clone = x.clone()
    clone.add_(select, alpha=2)
    del select
    view = clone.view(-1)
    view.mul_(3)
    upper = "name".upper()
    return (clone, view, upper)
