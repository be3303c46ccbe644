# piecework stitching source, format 1

import torch


def execution_fn(x, weight, *, __vllm_submods__):
    linear = torch.nn.functional.linear(x, weight)
    relu = torch.relu(linear)
    del linear
    torch.sigmoid(relu)
    mul = torch.mul(relu, other=0.5)
    del relu
    return mul
