# piecework stitching source, format 1
#
# __vllm_submods__:
#   [0] submod_0
#   [1] submod_2
#   [2] submod_4
#
# __vllm_consts__:
#   [0] torch.float32

import torch


def submod_1(sin, dim):
    # shared by 2 submodules
    cumsum_default = torch.ops.aten.cumsum.default(sin, dim)
    cumsum_default_1 = torch.ops.aten.cumsum.default(cumsum_default, 0, dtype=__vllm_consts__[0])
    del cumsum_default
    return cumsum_default_1


def execution_fn(x, *, __vllm_submods__):
    (sin,) = __vllm_submods__[0](x)
    cumsum_default_1 = submod_1(sin, 0)
    del sin
    add, sin_1 = __vllm_submods__[1](x, cumsum_default_1)
    del cumsum_default_1
    cumsum_default_3 = submod_1(sin_1, 1)
    del sin_1
    (add_1,) = __vllm_submods__[2](add, cumsum_default_3)
    del add, cumsum_default_3
    return (add_1,)
