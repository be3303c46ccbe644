"""Switches around a call and of torch's compiler; they mean what ``torch.compile`` has them mean."""

import os
import sys
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.fx
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext, _device_constructors

T = TypeVar("T")

#: The stance in which nothing that is compiled runs.
FORCE_EAGER = "force_eager"


def stance_holder() -> object:
    """What has the stance as ``_stance``, another object after each change; imports nothing."""
    frames = sys.modules.get("torch._dynamo.eval_frame")
    return frames if hasattr(frames, "_stance") else _Frames()


class _Frames:
    """Dynamo's module of that name, whenever it is imported; until then nobody has set a stance."""

    @property
    def _stance(self) -> object:
        return getattr(sys.modules.get("torch._dynamo.eval_frame"), "_stance", None)


def stance_name() -> str:
    """The current stance, such as ``"default"`` or ``"force_eager"``."""
    return str(getattr(stance_holder()._stance, "stance", "default"))  # type: ignore[attr-defined]


def compiler_off() -> str | None:
    """The switch that keeps ``torch.compile`` from compiling anything now; None for none."""
    by_variable = os.environ.get("TORCH_COMPILE_DISABLE") == "1"
    if getattr(sys.modules.get("torch._dynamo.config"), "disable", by_variable):
        return "TORCH_COMPILE_DISABLE=1" if by_variable else "torch._dynamo.config.disable"
    if os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        return "TORCHDYNAMO_DISABLE=1"
    stance = stance_name()
    if stance in (FORCE_EAGER, "eager_on_recompile"):
        return f'torch.compiler.set_stance("{stance}")'
    return None


def may_recompile() -> bool:
    return compiler_off() is None and stance_name() != "fail_on_recompile"


def in_default_stance(call: Callable[[], T]) -> T:
    """``call()`` while torch compiles whatever it is given: this compilation was asked for."""
    stance = stance_holder()._stance  # type: ignore[attr-defined]
    if stance is None or (stance.stance == "default" and stance.backend is None):
        return call()

    # Outside of any region that torch compiles: inside one, a stance can't be set.
    @torch.compiler.disable
    def run() -> T:
        with torch.compiler.set_stance("default"):
            return call()

    return run()


#: Whether autocast is on for any device type.
autocast_enabled = torch._C._is_any_autocast_enabled
#: How many ``TorchDispatchMode`` are active.
dispatch_modes = torch._C._len_torch_dispatch_stack
#: A context in which those that are active see nothing.
no_dispatch_modes = torch.utils._python_dispatch._disable_current_modes
#: How many ``TorchFunctionMode`` are active.
function_modes = torch._C._len_torch_function_stack

#: A context with autocast off for every device type.
autocast_off = torch._C._DisableAutocast

#: What ``torch.no_grad`` calls, without its object.
set_grad_enabled = torch._C._set_grad_enabled


def autocast_state() -> tuple[tuple[str, torch.dtype], ...]:
    """The device types for which autocast is on, with their dtypes."""
    kinds = sorted(torch._C._autocast_supported_devices())
    return tuple((k, torch.get_autocast_dtype(k)) for k in kinds if torch.is_autocast_enabled(k))


def drop_idle_autocast(graph: torch.fx.GraphModule) -> None:
    """Take out regions that switch autocast off where it is off: Inductor keeps no such graph."""
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


def watching_mode() -> str:
    """The active mode that sees what a model does, but for a default device; "" if there is none."""
    if dispatch_modes():
        return "a torch dispatch mode"
    modes = _get_current_function_mode_stack()
    only_default_devices = all(isinstance(mode, DeviceContext) for mode in modes)
    return "" if only_default_devices else "a torch function mode"
