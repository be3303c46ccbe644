# piecework replay source, format 1
#
# model: Stack
# graphs: PIECEWISE tokens=8, address policy: copy
#
# Held by this module; each is the same memory at every replay:
#   stage: copies x into persistent buffers
#   replay_0: static graph of submod_0
#   submod_2_in_1: static buffer of submod_2
#   replay_1: static graph of submod_2
#   submod_4_in_1: static buffer of submod_4
#   replay_2: static graph of submod_4
#   left, right, out: output of submod_0
#   x_2, left_1, right_1, out_1: output of submod_2
#   x_1: output of submod_4
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
    # fresh tensor: address policy 'copy' stages it for submod_2
    submod_2_in_1.copy_(fresh_default)
    # layers.0.leave … layers.1  reads staged: fresh_default; persistent buffer: x; 4 weights
    replay_1()
    del fresh_default
    # layers.1  -> f32[s0, 8]
    fresh_default_1 = submod_1(left_1, right_1, out_1, "layers.1")
    # fresh tensor: address policy 'copy' stages it for submod_4
    submod_4_in_1.copy_(fresh_default_1)
    # layers.1.leave … layers.1  reads staged: fresh_default_1; output of an earlier captured piece: x_2; 2 weights
    replay_2()
    del fresh_default_1
    return (x_1,)
