"""What is switched on around a call: autocast, modes and transforms, at the cost of a C call."""

from __future__ import annotations

import torch
import torch.fx
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext, _device_constructors

#: Whether autocast is on for any device type.
autocast_enabled = torch._C._is_any_autocast_enabled
#: How many ``TorchDispatchMode`` are active.
dispatch_modes = torch._C._len_torch_dispatch_stack
#: How many ``TorchFunctionMode`` are active.
function_modes = torch._C._len_torch_function_stack

#: A context with autocast off for every device type.
autocast_off = torch._C._DisableAutocast

#: What ``torch.no_grad`` calls, without its object.
set_grad_enabled = torch._C._set_grad_enabled


def autocast_state() -> tuple[tuple[str, torch.dtype], ...]:
    """The device types for which autocast is on, with their dtypes."""
    kinds = ("cpu", "cuda", "xpu")
    return tuple((k, torch.get_autocast_dtype(k)) for k in kinds if torch.is_autocast_enabled(k))


def drop_idle_autocast(graph: torch.fx.GraphModule) -> None:
    """Take out regions that switch autocast off where it is off: Inductor keeps no graph with one."""
    nodes = graph.graph.find_nodes
    entered = nodes(op="call_function", target=torch.amp.autocast_mode._enter_autocast)
    left = nodes(op="call_function", target=torch.amp.autocast_mode._exit_autocast)
    kept = autocast_enabled() or any(node.args[2] for node in entered)  # one switches it on
    for node in () if kept else (*left, *entered):
        graph.graph.erase_node(node)


def transforms() -> object:
    """Whether a transform of ``torch.func``, forward-mode AD or ``torch.jit.trace`` is active."""
    return _interpreter() or _forward_ad._current_level >= 0 or torch._C._is_tracing()


_interpreter, _forward_ad = torch._C._functorch.peek_interpreter_stack, torch.autograd.forward_ad


def makes_tensors_where_told(function: object) -> bool:
    return function in _device_constructors()


def only_default_device_modes() -> bool:
    """True if every active ``TorchFunctionMode`` is the one behind ``torch.set_default_device``."""
    return all(isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack())
