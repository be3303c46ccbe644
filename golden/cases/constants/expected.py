# piecework stitching source, format 1
#
# __vllm_consts__:
#   [0] device(type='cpu')
#   [1] torch.bfloat16
#   [2] torch.float32
#   [3] float inf
#   [4] torch.float64
#   [5] Color RED
#   [6] Mode FAST
#   [7] range

import torch
import golden_case_constants


def execution_fn(x, *, __vllm_submods__):
    to = x.to(__vllm_consts__[0], __vllm_consts__[1])
    to_1 = to.to(device=__vllm_consts__[0], dtype=__vllm_consts__[2])
    del to
    full = torch.full(
        (2, 3), __vllm_consts__[3], dtype=__vllm_consts__[4], device=__vllm_consts__[0]
    )
    describe_all = golden_case_constants.describe_all(
        __vllm_consts__[5], __vllm_consts__[6], __vllm_consts__[7], (1,)
    )
    return (to_1, full, describe_all)
