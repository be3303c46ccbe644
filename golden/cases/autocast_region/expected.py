# piecework stitching source, format 1
#
# __vllm_consts__:
#   [0] torch.bfloat16

import torch
import torch.amp.autocast_mode


def execution_fn(x, *, __vllm_submods__):
    is_grad_enabled = torch.is_grad_enabled()
    torch._C._set_grad_enabled(False)
    try:
        _enter_autocast = torch.amp.autocast_mode._enter_autocast(
            "cpu", __vllm_consts__[0], True, None
        )
        try:
            matmul = torch.matmul(x, x)
        finally:
            torch.amp.autocast_mode._exit_autocast(_enter_autocast)
        del _enter_autocast
    finally:
        torch._C._set_grad_enabled(is_grad_enabled)
    del is_grad_enabled
    matmul_1 = torch.matmul(x, x)
    return (matmul, matmul_1)
