# piecework stitching source, format 1
#
# __vllm_consts__:
#   [0] torch.bfloat16

import torch
import torch.amp.autocast_mode


def execution_fn(x, *, __vllm_submods__):
    is_grad_enabled = torch.is_grad_enabled()
    torch._C._set_grad_enabled(False)
    _enter_autocast = torch.amp.autocast_mode._enter_autocast("cpu", __vllm_consts__[0], True, None)
    matmul = torch.matmul(x, x)
    torch.amp.autocast_mode._exit_autocast(_enter_autocast)
    del _enter_autocast
    torch._C._set_grad_enabled(is_grad_enabled)
    del is_grad_enabled
    matmul_1 = torch.matmul(x, x)
    return (matmul, matmul_1)
