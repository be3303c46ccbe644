# piecework stitching source, format 1
#
# __vllm_submods__:
#   [0] block.layers.0
#   [1] act
#   [2] block.layers.1

import torch


def execution_fn(x, *, __vllm_submods__):
    block_layers_0 = __vllm_submods__[0](x)
    act = __vllm_submods__[1](block_layers_0)
    del block_layers_0
    block_layers_1 = __vllm_submods__[0](input=act)
    del act
    block_layers_2 = __vllm_submods__[2](block_layers_1)
    del block_layers_1
    return block_layers_2
