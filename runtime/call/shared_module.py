"""A ``torch.nn.Module`` with the members of a model, which is what stands for the model.

What compiled code would go past is refused: hooks, moves and conversions, new members, copies.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch

from piecework.errors import BindError, ConfigError


class SharedModule(torch.nn.Module):
    """A ``torch.nn.Module`` with the members of ``model``, if any; it stays their owner."""

    model: Callable[..., object]  # what it stands for

    def __init__(self, model: Callable[..., object]) -> None:
        # Not Module.__init__: it sets `training`, which is the model's.
        members = vars(torch.nn.Module())
        del members["training"]
        if isinstance(model, torch.nn.Module):
            members |= {name: vars(model)[name] for name in _MEMBERS}
        vars(self).update(members, model=model)

    def __setattr__(self, name: str, value: object) -> None:
        """Set an attribute of this object."""
        held = isinstance(value, (torch.nn.Parameter, torch.nn.Module)) and name != "as_it_is"
        if held or name == "forward" or any(name in vars(self)[each] for each in _MEMBERS):
            why = f"{name} can't be set on a stitched module: compiled code would go on without it"
            hint = "set it on .model, then rebind() for a weight, or compile again"
            raise BindError(why, hint=hint)
        object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> Any:
        """Members of the model."""
        made = getattr(type(self), name, None)
        if isinstance(made, property):
            return made.__get__(self)  # raises again what Python has dropped
        try:
            return super().__getattr__(name)
        except AttributeError:
            has = hasattr(vars(self).get("model"), name)
        more = f"; its model has: .model.{name}, which runs as it is" if has else ""
        raise AttributeError(f"a stitched module has no attribute {name!r}{more}")

    @property
    def training(self) -> bool:  # type: ignore[override]
        """Whether the model is in training mode; calls in another than the trace's are refused."""
        return bool(getattr(self.model, "training", False))

    @training.setter
    def training(self, mode: bool) -> None:
        if isinstance(self.model, torch.nn.Module):
            self.model.training = mode


def require_model(model: object) -> None:
    """Refuse what can't be called as a model, or is stitched already, with a `ConfigError`."""
    called = model.forward if isinstance(model, torch.nn.Module) else model
    what = f"a {type(model).__qualname__}" if not callable(model) else ""
    if isinstance(model, type):
        what = f"the class {model.__qualname__}, not an instance"
    elif isinstance(model, SharedModule):
        what = "what is stitched already"
    elif isinstance(model, (torch.jit.ScriptModule, torch.jit.ScriptFunction)):
        what = "TorchScript, which has no Python code to capture"
    elif isinstance(model, torch.export.ExportedProgram):
        what = "an exported program, whose .module() is one"
    elif inspect.iscoroutinefunction(called) or inspect.isgeneratorfunction(called):
        what = f"{model_name(called)}, which returns a coroutine or a generator"
    if what:
        raise ConfigError(
            f"a model is a torch.nn.Module or a function that returns tensors; got {what}",
            hint="pass the model itself; piecework.load(path, model) takes what was saved",
        )


def model_name(model: Callable[..., object]) -> str:
    """What to call ``model``: its class, or the function's own name."""
    if isinstance(model, torch.nn.Module):
        return type(model).__name__
    return str(getattr(model, "__qualname__", type(model).__name__)).rpartition("<locals>.")[2]


def _refused(name: str, why: str, hint: str) -> Callable[..., object]:
    def refuse(self: SharedModule, *args: object, **kwargs: object) -> object:
        raise BindError(f"{why} ({name})", where="stitched module", hint=hint)

    return refuse


_MEMBERS = ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules")
# What torch.nn.Module runs around forward, or puts into a module: a compiled call would go past it.
for _name in (
    *("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"),
    *("register_full_backward_pre_hook", "register_backward_hook", "compile"),
    *("register_buffer", "register_parameter", "register_module", "add_module"),
):
    _hint = "do it on the model before it is compiled, or on a module around the stitched one"
    setattr(SharedModule, _name, _refused(_name, "it has no effect on compiled code", _hint))
for _name, _why, _hint in (
    # to, cuda, half and the like
    ("_apply", "a stitched module can't be moved or converted", "convert the model, and compile"),
    ("__reduce_ex__", "a stitched module can't be copied or pickled", "copy the model"),
    ("__prepare_scriptable__", "a stitched module can't be scripted", "script the model itself"),
):
    setattr(SharedModule, _name, _refused(_name, _why, _hint))
