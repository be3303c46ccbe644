# piecework stitching source, format 1
#
# model: TwoLayers
# pieces: 3, unique: 3, compiler: eager
# splitting ops: golden_captured_module::attention (2 submodules)
#
# __vllm_submods__:
#   [0] submod_0  140b6eca
#   [1] submod_2  55286bc0
#   [2] submod_4  6ae891f7
#
# __vllm_consts__:
#   [0] function attention

import torch

# golden_captured_module.attention.default: its own implementation, past the dispatcher
attention = __vllm_consts__[0]


def execution_fn(s0, x, *, __vllm_submods__):
    # sizes: s0 = x.shape[0]
    # layers.0.project … layers.0  -> f32[s0, 8], f32[s0, 8], f32[s0, 8]
    key, out, mul = __vllm_submods__[0](
        s0, x, layers_0_project_weight, layers_0_project_bias, layers_0_scale
    )
    # layers.0  graph.py  attention(query * self.scale, key, out)
    attention(mul, key, out)
    del key, mul
    # layers.0 … layers.1  -> f32[s0, 8], f32[s0, 8], f32[s0, 8], f32[s0, 8]
    x_2, key_1, out_1, mul_1 = __vllm_submods__[1](
        s0, x, out, layers_1_project_weight, layers_1_project_bias, layers_1_scale
    )
    del out
    # layers.1  graph.py  attention(query * self.scale, key, out)
    attention(mul_1, key_1, out_1)
    del key_1, mul_1
    # layers.1  -> f32[s0 - 1, 8]
    (getitem_8,) = __vllm_submods__[2](s0, x_2, out_1)
    del x_2, out_1
    return (getitem_8,)


# Bound names, held by this module instead of being passed per call:
#   layers_0_project_weight: f32[16, 8] = layers.0.project.weight
#   layers_0_project_bias: f32[16] = layers.0.project.bias
#   layers_0_scale: f32[] = layers.0.scale
#   layers_1_project_weight: f32[16, 8] = layers.1.project.weight
#   layers_1_project_bias: f32[16] = layers.1.project.bias
#   layers_1_scale: f32[] = layers.1.scale
