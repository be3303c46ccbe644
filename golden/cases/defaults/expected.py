# piecework stitching source, format 1
#
# __vllm_consts__:
#   [0] torch.float64

import torch


def execution_fn(x, scale=2.0, dtype=__vllm_consts__[0], bias=None, *, __vllm_submods__):
    mul = torch.mul(x, scale)
    to = mul.to(dtype)
    del mul
    return (to, bias)
