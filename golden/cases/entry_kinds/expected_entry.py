# piecework entry, format 1
# model: Demo

import torch


def check_inputs(ids, cache, state, dtype, flag):
    # ids: int64[s0] on cpu, contiguous
    if not (
        type(ids) is torch.Tensor
        and ids.dtype is torch.int64
        and ids.layout is torch.strided
        and ids.is_cpu
        and ids.dim() == 1
        and ids.is_contiguous()
    ):
        explain_inputs(ids, cache, state, dtype, flag)
    (s0,) = ids.shape
    # cache: a tuple of 2
    if not (type(cache) is tuple and len(cache) == 2):
        explain_inputs(ids, cache, state, dtype, flag)
    cache_0_ = cache[0]
    # cache[0]: float16[s1, 2, s0] on cuda:1, strided as traced
    if not (
        type(cache_0_) is torch.Tensor
        and cache_0_.dtype is torch.float16
        and cache_0_.layout is torch.strided
        and cache_0_.is_cuda
        and cache_0_.get_device() == 1
        and cache_0_.dim() == 3
        and not cache_0_.is_neg()
    ):
        explain_inputs(ids, cache, state, dtype, flag)
    s1, cache_0__1, cache_0__2 = cache_0_.shape
    if not (cache_0__1 == 2 and cache_0__2 == s0):
        explain_inputs(ids, cache, state, dtype, flag)
    cache_1_ = cache[1]
    # cache[1]: fixed by the trace
    if not (type(cache_1_) is str and cache_1_ == "mean"):
        explain_inputs(ids, cache, state, dtype, flag)
    # state: float16[s1, 2] on cuda:1, contiguous
    if not (
        type(state) is torch.Tensor
        and state.dtype is torch.float16
        and state.layout is torch.strided
        and state.is_cuda
        and state.get_device() == 1
        and state.dim() == 2
        and state.is_contiguous()
        and not state.is_neg()
    ):
        explain_inputs(ids, cache, state, dtype, flag)
    state_0, state_1 = state.shape
    if not (state_0 == s1 and state_1 == 2):
        explain_inputs(ids, cache, state, dtype, flag)
    # dtype: fixed by the trace
    if not (
        (dtype is traced_dtype or (type(dtype) is type(traced_dtype) and dtype == traced_dtype))
    ):
        explain_inputs(ids, cache, state, dtype, flag)
    # flag: fixed by the trace
    if not (flag is True):
        explain_inputs(ids, cache, state, dtype, flag)
    # sizes that the trace allows
    if not (s0 >= 2 and 0 <= s1 <= 64):
        explain_inputs(ids, cache, state, dtype, flag)
    # relations that the trace relied on
    if not (
        cache_0_.stride(0) == 2
        and cache_0_.stride(1) == 2 * s1
        and cache_0_.stride(2) == 1
        and s0 % 2 == 0
    ):
        explain_inputs(ids, cache, state, dtype, flag)
    # 3 tensors
    if not (len({id(ids), id(cache_0_), id(state)}) == 3):
        explain_inputs(ids, cache, state, dtype, flag)
    # state: written, so no other argument may share its memory
    if not (memory_apart(state, ids, cache_0_)):
        explain_inputs(ids, cache, state, dtype, flag)
    return (s0, cache_0_, s1)


def entry(ids, cache, state, dtype, *, flag=True):
    if dynamo._stance is not stance:
        return entry_in_stance(ids, cache, state, dtype, flag=flag)
    if torch.is_grad_enabled():
        return entry_without_gradients(ids, cache, state, dtype, flag=flag)
    if (
        autocast_enabled()
        or dispatch_modes()
        or function_modes()
        or transforms()
        or not same_kernels()
    ):
        return entry_with_care(ids, cache, state, dtype, flag=flag)
    s0, cache_0_, s1 = check_inputs(ids, cache, state, dtype, flag)
    # for all of this call, whatever is bound meanwhile
    execution_fn, weights_as_bound, fetch_weights, count_call = bound
    if not weights_as_bound():
        explain_weights()
    count_call()
    (logits,) = execution_fn(s1, ids, cache_0_, cache_0_.size(2), __vllm_submods__=submods_for(s0))
    return {"logits": logits, "n": 3}
