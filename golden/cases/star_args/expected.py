# piecework stitching source, format 1

import torch


def execution_fn(first, *_rest, __vllm_submods__, **_options):
    len_1 = len(_rest)
    add = torch.add(first, len_1)
    del len_1
    len_2 = len(_options)
    return (add, len_2)
