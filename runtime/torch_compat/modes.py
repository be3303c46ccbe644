"""What is switched on around a call: probes for autocast, modes and transforms that cost a C call."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
import torch.fx
from torch.overrides import _get_current_function_mode_stack
from torch.utils import _pytree as pytree
from torch.utils._device import DeviceContext, _device_constructors
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from piecework.runtime.torch_compat.tensors import is_fake

#: Whether autocast is on for any device type.
autocast_enabled = torch._C._is_any_autocast_enabled
#: How many ``TorchDispatchMode`` are active.
dispatch_modes = torch._C._len_torch_dispatch_stack
#: How many ``TorchFunctionMode`` are active.
function_modes = torch._C._len_torch_function_stack

#: What ``torch.no_grad`` calls, without its object.
set_grad_enabled = torch._C._set_grad_enabled


def autocast_state() -> tuple[tuple[str, torch.dtype], ...]:
    """The device types for which autocast is on, with their dtypes."""
    kinds = ("cpu", "cuda", "xpu")
    return tuple((k, torch.get_autocast_dtype(k)) for k in kinds if torch.is_autocast_enabled(k))


def autocast_off() -> AbstractContextManager[object]:
    """Autocast off for every device type, in the block."""
    return torch._C._DisableAutocast()


def drop_idle_autocast(graph: torch.fx.GraphModule) -> None:
    """Take out the regions that switch autocast off where it is off: Inductor keeps no graph that has one."""
    nodes = graph.graph.find_nodes
    entered = nodes(op="call_function", target=torch.amp.autocast_mode._enter_autocast)
    left = nodes(op="call_function", target=torch.amp.autocast_mode._exit_autocast)
    kept = autocast_enabled() or any(node.args[2] for node in entered)  # one switches it on
    for node in () if kept else (*left, *entered):
        graph.graph.erase_node(node)


def transforms() -> object:
    """Whether a transform of ``torch.func`` (vmap, grad and the like), forward-mode differentiation or ``torch.jit.trace`` is active."""
    return _interpreter() or _forward_ad._current_level >= 0 or jit_tracing()


#: Whether ``torch.jit.trace`` records this thread: it would keep what compiled pieces give as constants.
jit_tracing = torch._C._is_tracing


def traced_by_others(given: object) -> bool:
    """Whether ``torch.fx.symbolic_trace``, ``make_fx`` or ``torch.export`` traces a call in this thread; what others trace is none of its business.

    Args:
        given: the arguments.
    """
    modes = {type(each).__name__ for each in _get_current_dispatch_mode_stack()}
    if "ProxyTorchDispatchMode" in modes:
        return True
    leaves = pytree.tree_leaves(given)
    return any(isinstance(each, torch.fx.Proxy) for each in leaves) or (
        "FakeTensorMode" in modes and any(map(is_fake, leaves))
    )


_interpreter, _forward_ad = torch._C._functorch.peek_interpreter_stack, torch.autograd.forward_ad


def makes_tensors_where_told(function: object) -> bool:
    """Whether ``function`` makes tensors on the default device unless it is told where."""
    return function in _device_constructors()


def only_default_device_modes() -> bool:
    """True if every active ``TorchFunctionMode`` is the one behind ``torch.set_default_device``."""
    return all(isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack())
