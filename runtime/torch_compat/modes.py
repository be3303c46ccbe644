"""What is switched on around a call. In: nothing. Out: probes for autocast, modes and transforms that cost a C call."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch


def autocast_probe() -> Callable[[], object]:
    """A function that is true while autocast is on for any device type."""
    probe = getattr(torch._C, "_is_any_autocast_enabled", None)
    if probe is not None:
        return probe
    return lambda: any(map(torch.is_autocast_enabled, ("cpu", "cuda")))


def autocast_state() -> tuple[tuple[str, torch.dtype], ...]:
    """The device types for which autocast is on, with their dtypes."""
    kinds = [kind for kind in ("cpu", "cuda", "xpu") if kind != "xpu" or hasattr(torch, "xpu")]
    return tuple((k, torch.get_autocast_dtype(k)) for k in kinds if torch.is_autocast_enabled(k))


def autocast_off() -> AbstractContextManager[object]:
    """Autocast off for every device type, in the block."""
    off = getattr(torch._C, "_DisableAutocast", None)
    return torch.autocast("cpu", enabled=False) if off is None else off()


def dispatch_mode_probe() -> Callable[[], object]:
    """A function that is true while a ``TorchDispatchMode`` is active."""
    probe = getattr(torch._C, "_len_torch_dispatch_stack", None)
    if probe is not None:
        return probe
    from torch.utils._python_dispatch import _get_current_dispatch_mode

    return _get_current_dispatch_mode


def function_mode_probe() -> Callable[[], object]:
    """A function that is true while a ``TorchFunctionMode`` is active."""
    probe = getattr(torch._C, "_len_torch_function_stack", None)
    if probe is not None:
        return probe
    from torch.overrides import _get_current_function_mode

    return _get_current_function_mode


def transform_probe() -> Callable[[], object]:
    """A function that is true inside a transform of ``torch.func`` (vmap, grad and the like) or forward-mode differentiation."""
    functorch = getattr(torch._C, "_functorch", None)
    transforms = getattr(functorch, "peek_interpreter_stack", None)
    if transforms is None:
        from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters

        transforms = retrieve_all_functorch_interpreters
    forward_ad = torch.autograd.forward_ad
    if not hasattr(forward_ad, "_current_level"):
        return transforms
    return lambda: transforms() or forward_ad._current_level >= 0


def makes_tensors_where_told(function: object) -> bool:
    """Whether ``function`` makes tensors on the default device unless it is told where."""
    try:
        from torch.utils._device import _device_constructors
    except ImportError:
        return True
    return function in _device_constructors()


def only_default_device_modes() -> bool:
    """True if every active ``TorchFunctionMode`` is the one behind ``torch.set_default_device``."""
    try:
        from torch.overrides import _get_current_function_mode_stack
        from torch.utils._device import DeviceContext
    except ImportError:
        return False
    return all(isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack())
