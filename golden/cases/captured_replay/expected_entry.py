# piecework entry, format 1
# model: Stack

import torch


def check_inputs(x):
    # x: float32[s0, 8] on cpu, contiguous
    if not (
        type(x) is torch.Tensor
        and x.dtype is torch.float32
        and x.layout is torch.strided
        and x.is_cpu
        and x.dim() == 2
        and x.is_contiguous()
        and not x.is_neg()
    ):
        explain_inputs(x)
    s0, x_1 = x.shape
    if not (x_1 == 8):
        explain_inputs(x)
    # sizes that the trace allows
    if not (s0 >= 0):
        explain_inputs(x)
    return s0


def entry(x):
    if dynamo._stance is not stance:
        return entry_in_stance(x)
    if torch.is_grad_enabled():
        return entry_without_gradients(x)
    if (
        autocast_enabled()
        or dispatch_modes()
        or function_modes()
        or transforms()
        or not same_kernels()
    ):
        return entry_with_care(x)
    s0 = check_inputs(x)
    # for all of this call, whatever is bound meanwhile
    execution_fn, weights_as_bound, fetch_weights, count_call = bound
    if not weights_as_bound():
        explain_weights()
    count_call()
    (x_1_1,) = execution_fn(s0, x)
    return x_1_1
