"""The modules and tensors that a callable holds, by attributes, closures, globals that its code names, and bound arguments."""

from __future__ import annotations

import functools
import inspect
import types
from collections import deque
from collections.abc import Callable, Iterator

import torch

from piecework.code_objects import cells_of, with_inner_code

_MUCH = 1000


def modules_of(model: Callable[..., object]) -> list[tuple[str, torch.nn.Module]]:
    """Modules reachable from ``model``, each once, with the prefix that the paths of its weights get.

    A module itself has none, and neither has the single module that a function or method holds.
    """
    if isinstance(model, torch.nn.Module):
        return [("", model)]
    owner = getattr(model, "__self__", None)
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
    """What a callable that is no module reaches by name: bound arguments, closure cells, globals, its object's attributes."""
    if isinstance(model, functools.partial):
        for index, value in enumerate(model.args):
            yield f"args_{index}", value
        yield from model.keywords.items()
        yield from _inner(model.func)
        return
    owner = getattr(model, "__self__", None)
    if owner is not None and not inspect.ismodule(owner):
        yield from _attributes(owner)
    function = inspect.unwrap(getattr(model, "__func__", model))
    if not inspect.isfunction(function):  # an object that is called
        if not inspect.isroutine(model) and not inspect.isclass(model):
            yield from _attributes(model)
        return
    names = function.__code__.co_freevars
    for name, cell in zip(names, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # nothing is in it yet
            continue
    for name in function.__code__.co_names:
        if name in function.__globals__:
            yield name, function.__globals__[name]


def leads_to(start: object, is_it: Callable[[object], bool]) -> bool:
    """Whether a callable reaches something: by what it closes over, its defaults, globals that its code names, attributes, and what is in these.

    Where that is much, not all of it is looked at.
    """
    seen: dict[int, object] = {}
    pending = deque([start])
    while pending and len(seen) < _MUCH:
        each = pending.popleft()
        if is_it(each):
            return True
        if id(each) not in seen and not isinstance(each, (type, types.ModuleType, torch.Tensor)):
            seen[id(each)] = each
            pending += _next(each)
    return False


def _next(value: object) -> Iterator[object]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, (list, tuple)):
        yield from value
    elif isinstance(value, types.MethodType):
        yield from (value.__func__, value.__self__)
    elif isinstance(value, functools.partial):
        yield from (value.func, value.args, value.keywords)
    elif isinstance(value, types.FunctionType):
        yield from cells_of(value).values()
        yield from (value.__defaults__, value.__kwdefaults__, value.__dict__)
        names = set().union(*(each.co_names for each in with_inner_code([value.__code__])))
        yield from (value.__globals__[name] for name in names & value.__globals__.keys())
    else:
        yield getattr(value, "__dict__", None)


def _inner(model: object) -> Iterator[tuple[str, object]]:
    if isinstance(model, torch.nn.Module):
        yield "func", model
    elif callable(model):
        yield from reachable(model)


def _attributes(owner: object) -> Iterator[tuple[str, object]]:
    held = getattr(owner, "__dict__", None)
    if isinstance(held, dict):
        yield from held.items()


def own_tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and then buffers of a module and of those in it, by name; a tied one under each of its names."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def tensors_of(model: Callable[..., object]) -> dict[int, tuple[str, torch.Tensor]]:
    """Parameters and buffers that ``model`` holds, by identity, with their paths."""
    held: dict[int, tuple[str, torch.Tensor]] = {}
    for prefix, module in modules_of(model):
        for name, tensor in own_tensors(module):
            held.setdefault(id(tensor), (f"{prefix}{name}", tensor))
    return held
