# piecework stitching source, format 1
#
# __vllm_consts__:
#   [0] function build.<locals>.nested
#   [1] function build.<locals>.<lambda>
#   [2] partial
#   [3] method Linear.extra_repr

import torch


def execution_fn(x, *, __vllm_submods__):
    nested = __vllm_consts__[0](x)
    _lambda_ = __vllm_consts__[1](nested)
    del nested
    half = __vllm_consts__[2](_lambda_)
    del _lambda_
    _lambda__1 = __vllm_consts__[1](half)
    del half
    extra_repr = __vllm_consts__[3]()
    return (_lambda__1, extra_repr)
