# piecework replay source, format 1
#
# model: Stack
# graphs: PIECEWISE tokens=8, address policy: eager
#
# Held by this module; each is the same memory at every replay:
#   stage: copies x into persistent buffers
#   replay_0: static graph of submod_0
#   submod_2: runs uncaptured
#   submod_4: runs uncaptured
#   x: persistent buffer
#   layers_0_leave_weight: weight
#   layers_0_leave_bias: weight
#   layers_1_enter_weight: weight
#   layers_1_enter_bias: weight
#   layers_1_leave_weight: weight
#   layers_1_leave_bias: weight
#   left, right, out: output of submod_0
#
# __vllm_consts__:
#   [0] function mix
#   [1] function fresh

import torch

# replay_golden.mix.default: its own implementation, past the dispatcher
mix = __vllm_consts__[0]
# replay_golden.fresh.default: its own implementation, past the dispatcher
fresh = __vllm_consts__[1]

s0 = 8


def submod_1(left, right, out, layer):
    # shared by 2 submodules
    # layers.0  graph.py  mix(left, right, out, self.name)
    mix(left, right, out, layer)
    # layers.0  graph.py  return x + self.leave(fresh(out))  -> f32[s0, 8]
    fresh_default = fresh(out)
    return fresh_default


def replay(inputs):
    # inputs: x, padded to 8
    stage(inputs)
    # layers.0.enter … layers.0  reads persistent buffer: x; 2 weights
    replay_0()
    # layers.0  -> f32[s0, 8]
    fresh_default = submod_1(left, right, out, "layers.0")
    # layers.0.leave … layers.1: runs uncaptured: argument 1 (fresh tensor) enters it
    x_2, left_1, right_1, out_1 = submod_2(
        s0,
        fresh_default,
        layers_0_leave_weight,
        layers_0_leave_bias,
        x,
        layers_1_enter_weight,
        layers_1_enter_bias,
    )
    del fresh_default
    # layers.1  -> f32[s0, 8]
    fresh_default_1 = submod_1(left_1, right_1, out_1, "layers.1")
    del left_1, right_1, out_1
    # layers.1.leave … layers.1: runs uncaptured: argument 1 (fresh tensor) enters it
    (x_1,) = submod_4(s0, fresh_default_1, layers_1_leave_weight, layers_1_leave_bias, x_2)
    del x_2, fresh_default_1
    return (x_1,)
