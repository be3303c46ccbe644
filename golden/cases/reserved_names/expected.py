# piecework stitching source, format 1

import torch
import math


def execution_fn(
    torch_1,
    v_lambda,
    slice_1,
    execution_fn_1,
    vllm_submods__,
    vllm_consts__,
    not_valid_,
    *,
    __vllm_submods__,
):
    math_1 = torch.add(torch_1, v_lambda)
    len_1 = math.sqrt(slice_1)
    len_1_1 = len([slice(execution_fn_1, vllm_submods__, None), len_1, vllm_consts__, not_valid_])
    return (math_1, len_1, len_1_1)
