# piecework replay source, format 1
#
# model: Stack
# graphs: FULL tokens=8 reqs=8, address policy: copy
#
# Held by this module; each is the same memory at every replay:
#   stage: copies x into persistent buffers
#   replay_0: static graph of whole_forward
#   x_1: output of whole_forward

import torch

s0 = 8


def replay(inputs):
    # inputs: x, padded to 8
    stage(inputs)
    # layers.0 … layers.1  reads persistent buffer: x
    replay_0()
    return (x_1,)
