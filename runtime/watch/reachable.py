"""The modules and tensors that a callable holds by name."""

import functools
import inspect
from collections.abc import Callable, Iterator

import torch

from piecework.code_objects import cells_of


def modules_of(model: Callable[..., object]) -> list[tuple[str, torch.nn.Module]]:
    """Modules reachable from ``model`` with the prefix of their paths; a single one has none."""
    for owner in (model, getattr(model, "__self__", None)):
        if isinstance(owner, torch.nn.Module):
            return [("", owner)]
    found: dict[int, tuple[str, torch.nn.Module]] = {}
    for name, value in reachable(model):
        if isinstance(value, torch.nn.Module):
            found.setdefault(id(value), (f"{name}.", value))
    if len(found) == 1:
        return [("", module) for _, module in found.values()]
    return list(found.values())


def reachable(model: Callable[..., object]) -> Iterator[tuple[str, object]]:
    """What a callable that is no module reaches: bound arguments, cells, globals, attributes."""
    if isinstance(model, functools.partial):
        yield from ((f"args_{index}", value) for index, value in enumerate(model.args))
        yield from model.keywords.items()
        is_module = isinstance(model.func, torch.nn.Module)
        yield from [("func", model.func)] if is_module else reachable(model.func)
        return
    owner = getattr(model, "__self__", None)
    if not inspect.ismodule(owner):
        yield from getattr(owner, "__dict__", {}).items()
    function = inspect.unwrap(getattr(model, "__func__", model))
    if not inspect.isfunction(function):  # an object that is called
        if not inspect.isroutine(model) and not inspect.isclass(model):
            yield from getattr(model, "__dict__", {}).items()
        return
    yield from cells_of(function).items()
    scope = function.__globals__
    yield from ((name, scope[name]) for name in function.__code__.co_names if name in scope)


def own_tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and then buffers of a module, by name; a tied one under each of its names."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def tensors_of(model: Callable[..., object]) -> dict[int, tuple[str, torch.Tensor]]:
    """Parameters and buffers that ``model`` holds, by identity, with their paths."""
    held: dict[int, tuple[str, torch.Tensor]] = {}
    for prefix, module in modules_of(model):
        for name, tensor in own_tensors(module):
            held.setdefault(id(tensor), (f"{prefix}{name}", tensor))
    return held
