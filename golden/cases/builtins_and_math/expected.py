# piecework stitching source, format 1

import torch
import math


def execution_fn(x, n, *, __vllm_submods__):
    len_1 = len(x)
    sqrt = math.sqrt(n)
    round_1 = round(sqrt, 2)
    del sqrt
    max_1 = max(n, len_1, 3)
    max_2 = torch.max(x)
    floor = math.floor(round_1)
    abs_1 = abs(-3)
    bool_1 = bool(n)
    slice_1 = slice(0, max_1)
    getitem = x[slice_1]
    del slice_1
    return (len_1, round_1, max_1, max_2, floor, abs_1, bool_1, getitem)
