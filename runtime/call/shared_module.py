"""A ``torch.nn.Module`` with the members of a model, which is what stands for the model.

What compiled code would go past is refused: hooks, moves and conversions, new members, copies.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch

from piecework.errors import BindError, ConfigError


class SharedModule(torch.nn.Module):
    """A ``torch.nn.Module`` with the parameters, buffers, submodules and state of ``model``, which stays the owner of all of them.

    ``train()`` and ``load_state_dict()`` are the model's. Of a model that is no module, it has none of these.

    Attributes:
        model: what it stands for.
    """

    model: Callable[..., object]

    def __init__(self, model: Callable[..., object]) -> None:
        # Not Module.__init__: it sets `training`, which is the model's.
        vars(self).update(_members_of(model), model=model)

    def __setattr__(self, name: str, value: object) -> None:
        """Set an attribute of this object; members of the model are set on the model.

        Raises:
            BindError: it is a parameter, buffer or submodule, which compiled code would not see; or what this object is made of.
        """
        if name == "forward" or (name in _MADE_OF and name in vars(self)):
            raise BindError(
                f"{name} can't be set on a stitched module: what is compiled would go on without it",
                hint="compile the model again",
            )
        members = (self._parameters, self._buffers, self._modules)
        held = isinstance(value, (torch.nn.Parameter, torch.nn.Module)) and name not in _OWN
        if held or any(name in each for each in members):
            raise BindError(
                f"{name} can't be set on a stitched module: it shares the members of its model",
                hint="set it on .model, then rebind() for a weight, or compile again",
            )
        object.__setattr__(self, name, value)

    def __delattr__(self, name: str) -> None:
        object.__delattr__(self, name)

    def __getattr__(self, name: str) -> Any:
        """Members of the model; what else the model has is named.

        Raises:
            NotThereError: a property has nothing to give yet.
            AttributeError: there is none; a method of the model is reached by ``model``, and runs uncompiled.
        """
        made = getattr(type(self), name, None)
        if isinstance(made, property):
            return made.__get__(self)  # raises again what Python has dropped
        try:
            return super().__getattr__(name)
        except AttributeError:
            pass
        if hasattr(vars(self).get("model"), name):
            raise AttributeError(
                f"a stitched module has no attribute {name!r}; its model has: .model.{name}, which runs as it is"
            )
        raise AttributeError(f"a stitched module has no attribute {name!r}")

    @property
    def training(self) -> bool:  # type: ignore[override]
        """Whether the model is in training mode."""
        return bool(getattr(self.model, "training", False))

    @training.setter
    def training(self, mode: bool) -> None:
        if isinstance(self.model, torch.nn.Module):
            self.model.training = mode

    def train(self, mode: bool = True) -> Self:
        """Put the model into training or evaluation mode; calls in another mode than the trace's are refused."""
        if isinstance(self.model, torch.nn.Module):
            self.model.train(mode)
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The model's."""
        if isinstance(self.model, torch.nn.Module):
            return self.model.state_dict(*args, **kwargs)
        return super().state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The model's. Values that are copied in place serve at once; after ``assign=True`` call `rebind`."""
        if isinstance(self.model, torch.nn.Module):
            return self.model.load_state_dict(state_dict, *args, **kwargs)
        return super().load_state_dict(state_dict, *args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if isinstance(self.model, torch.nn.Module):
            self.model._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: object, recurse: bool = True) -> Self:
        """Refused, and with it ``to``, ``cuda``, ``half`` and the like: compiled pieces are made for one device and dtype.

        Raises:
            BindError: always.
        """
        raise BindError(
            "a stitched module can't be moved or converted: its pieces are compiled for the device and dtype of its weights",
            hint="move or convert the model, and compile it again",
        )

    def __prepare_scriptable__(self) -> object:
        """Refused: what ``torch.jit.script`` asks a module for.

        Raises:
            BindError: always.
        """
        raise BindError(
            "a stitched module can't be scripted: it runs compiled code, which TorchScript can't read",
            hint="script the model itself; stitched.save keeps what is compiled for another process",
        )

    def __reduce_ex__(self, protocol: object) -> object:
        """Refused: compiled pieces belong to this process, and a copy would share the weights of ``model``.

        Raises:
            BindError: always.
        """
        raise BindError(
            "a stitched module can't be copied or pickled: it holds compiled code and the weights of its model",
            hint="copy or pickle the model, and compile it again: what was compiled once comes from the cache",
        )


def require_model(model: object) -> None:
    """Refuse what can't be called as a model, or is stitched already.

    Raises:
        ConfigError: it is no callable, a class, a stitched module, TorchScript, an exported program, or a coroutine's or generator's function.
    """
    if isinstance(model, type):
        raise ConfigError(
            f"{model.__qualname__} is a class, not a model",
            hint=f"pass an instance: {model.__qualname__}(...)",
        )
    if isinstance(model, SharedModule):
        raise ConfigError("the model is stitched already", hint="call it, or compile its .model")
    if not callable(model):
        raise ConfigError(
            f"a model must be callable; got a {type(model).__qualname__}",
            hint=_instead_of(model),
        )
    if isinstance(model, (torch.jit.ScriptModule, torch.jit.ScriptFunction)):
        raise ConfigError(
            "the model is TorchScript, which has no Python code to capture",
            hint="pass the model that it was made of",
        )
    if isinstance(model, torch.export.ExportedProgram):
        raise ConfigError(
            "an exported program is no model to call",
            hint="pass its .module(), or the model itself",
        )
    called = model.forward if isinstance(model, torch.nn.Module) else model
    if inspect.iscoroutinefunction(called) or inspect.isgeneratorfunction(called):
        raise ConfigError(
            f"{model_name(model)} returns a coroutine or a generator, not the result of a forward",
            hint="pass a function that returns tensors",
        )


def _instead_of(value: object) -> str:
    """What to pass in place of something that is no model."""
    if isinstance(value, Mapping):
        return "load the weights into a model, and pass that"
    if isinstance(value, (str, os.PathLike)):
        return "pass the model itself; piecework.load(path, model) takes what was saved"
    return "pass a torch.nn.Module or a function"


def model_name(model: Callable[..., object]) -> str:
    """What to call ``model``: its class, or the function's own name."""
    if isinstance(model, torch.nn.Module):
        return type(model).__name__
    return str(getattr(model, "__qualname__", type(model).__name__)).rpartition("<locals>.")[2]


def _refused(name: str) -> Callable[..., object]:
    def refuse(self: SharedModule, *args: object, **kwargs: object) -> object:
        raise BindError(
            f"{name} has no effect on compiled code",
            where="stitched module",
            hint="do it on the model before it is compiled, or on a module around the stitched one",
        )

    refuse.__name__ = name
    return refuse


# What torch.nn.Module runs around forward, or puts into a module: a compiled call would go past it.
for _name in (
    *("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"),
    *("register_full_backward_pre_hook", "register_backward_hook", "compile"),
    *("register_buffer", "register_parameter", "register_module", "add_module"),
):
    setattr(SharedModule, _name, _refused(_name))

# Attributes that calls have read already.
_MADE_OF = frozenset({"model", "config", "runtime_config", "as_it_is", "kept"})

# Attributes of a stitched module that may be modules.
_OWN = frozenset({"model", "as_it_is", "_call"})


def _members_of(model: object) -> dict[str, object]:
    """The state of a new ``torch.nn.Module``, with the members of ``model`` for its own."""
    fresh = vars(torch.nn.Module())
    fresh.pop("training")
    if isinstance(model, torch.nn.Module):
        fresh |= {name: vars(model)[name] for name in _MEMBERS}
    return fresh


_MEMBERS = ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules")
