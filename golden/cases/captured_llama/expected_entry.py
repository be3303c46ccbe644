# piecework entry, format 1
# model: LlamaModel

import torch


def check_inputs(input_ids, position_ids):
    # input_ids: int64[1, s0] on cpu, contiguous
    if not (
        type(input_ids) is torch.Tensor
        and input_ids.dtype is torch.int64
        and input_ids.layout is torch.strided
        and input_ids.is_cpu
        and input_ids.dim() == 2
        and input_ids.is_contiguous()
    ):
        explain_inputs(input_ids, position_ids)
    input_ids_0, s0 = input_ids.shape
    if not (input_ids_0 == 1):
        explain_inputs(input_ids, position_ids)
    # position_ids: int64[1, s0] on cpu, contiguous
    if not (
        type(position_ids) is torch.Tensor
        and position_ids.dtype is torch.int64
        and position_ids.layout is torch.strided
        and position_ids.is_cpu
        and position_ids.dim() == 2
        and position_ids.is_contiguous()
    ):
        explain_inputs(input_ids, position_ids)
    position_ids_0, position_ids_1 = position_ids.shape
    if not (position_ids_0 == 1 and position_ids_1 == s0):
        explain_inputs(input_ids, position_ids)
    # sizes that the trace allows
    if not (s0 >= 0):
        explain_inputs(input_ids, position_ids)
    # relations that the trace relied on
    if not (s0 != 0):
        explain_inputs(input_ids, position_ids)
    # two tensors
    if not (input_ids is not position_ids):
        explain_inputs(input_ids, position_ids)
    return s0


def entry(input_ids, position_ids):
    if dynamo._stance is not stance:
        return entry_in_stance(input_ids, position_ids)
    if torch.is_grad_enabled():
        return entry_without_gradients(input_ids, position_ids)
    if (
        autocast_enabled()
        or dispatch_modes()
        or function_modes()
        or transforms()
        or not same_kernels()
    ):
        return entry_with_care(input_ids, position_ids)
    s0 = check_inputs(input_ids, position_ids)
    # for all of this call, whatever is bound meanwhile
    execution_fn, weights_as_bound, fetch_weights, count_call = bound
    if not weights_as_bound():
        explain_weights()
    count_call()
    (hidden_states_10,) = execution_fn(s0, input_ids, position_ids)
    return hidden_states_10
