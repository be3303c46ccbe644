"""The repeated layers of a model. In: a model. Out: groups of layers that are one program on other weights, the first of which shall be traced for all.

A list of modules (`torch.nn.ModuleList`, ``Sequential``, ``ModuleDict``) is where layers are looked for; other lists can be named.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from piecework.runtime.bind.reachable import modules_of
from piecework.runtime.regions.alike import Alike, Unlike

#: So many layers must be alike, so large each, for a shared trace to be worth its checks.
_AT_LEAST = 4
_PARTS = 3
_LISTS = (torch.nn.ModuleList, torch.nn.Sequential, torch.nn.ModuleDict)
_KINDS = 8  # of layers in one list


@dataclass(eq=False, slots=True)
class Group:
    """Layers that are alike.

    Attributes:
        holder: the list that has them.
        first: the layer that is traced.
        others: each other one, beside the first.
    """

    holder: torch.nn.Module
    first: torch.nn.Module
    others: list[Alike] = field(default_factory=list)

    def layers(self) -> Iterator[torch.nn.Module]:
        yield self.first
        yield from (each.second for each in self.others)


def repeated_layers(
    model: Callable[..., object],
    named: Sequence[str] | None,
    equal: frozenset[object],
    apart: Sequence[torch.nn.Module],
) -> list[Group]:
    """The groups of repeated layers in what ``model`` holds, outermost lists first; a layer is in one group.

    Args:
        named: dotted names of the modules whose children are looked at; None for every list of modules.
        equal: attributes in which the layers of a group must not differ.
        apart: layers that are in no group.
    """
    found: list[Group] = []
    seen = set(map(id, apart))
    for prefix, root in modules_of(model):
        _look(root, prefix.rstrip("."), named, equal, found, seen)
    members = [layer for group in found for layer in group.layers()]
    if len({id(each) for each in members}) < len(members):
        return []  # one layer in two lists: whose is it?
    return found


def _look(
    module: torch.nn.Module,
    path: str,
    named: Sequence[str] | None,
    equal: frozenset[object],
    found: list[Group],
    seen: set[int],
) -> None:
    if id(module) in seen:
        return
    seen.add(id(module))
    grouped: set[int] = set()
    if path in named if named is not None else isinstance(module, _LISTS):
        for group in _groups(module, equal, seen, 2 if named is not None else _AT_LEAST):
            found.append(group)
            grouped.update(map(id, group.layers()))
    for name, child in module.named_children():
        if id(child) not in grouped:
            _look(child, f"{path}.{name}".lstrip("."), named, equal, found, seen)


def _groups(
    holder: torch.nn.Module, equal: frozenset[object], apart: set[int], at_least: int
) -> Iterator[Group]:
    made: list[Group] = []
    for layer in holder.children():  # each once
        if id(layer) in apart or not _may_be_marked(layer):
            continue
        for group in made:
            try:
                alike = Alike.of(group.first, layer)
            except Unlike:
                continue
            if not any(each.name in equal for each in alike.differing):
                group.others.append(alike)
                break
        else:
            if len(made) < _KINDS:
                made.append(Group(holder, layer))
    yield from (group for group in made if 1 + len(group.others) >= at_least)


def _may_be_marked(layer: torch.nn.Module) -> bool:
    """Whether a layer is of a class of the user's, large enough, and is called the usual way."""
    kind = type(layer)
    return (
        not kind.__module__.startswith("torch.")
        and "forward" not in layer.__dict__
        and isinstance(kind.forward, types.FunctionType)
        and len(list(layer.modules())) >= _PARTS
    )
