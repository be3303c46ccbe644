"""Arguments that hold tensors in attributes. In: an argument and the classes that annotations name. Out: its tensors with labels, and classes that torch's pytree can see into.

Only classes that a user's annotation names are registered, and never one that torch knows already.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree


def tensors_in(value: object, name: str) -> list[tuple[str, torch.Tensor]]:
    """The tensors in ``value`` with their paths, such as ``hidden.tensors['h']``."""
    if isinstance(value, torch.Tensor):  # the common case, also for tensor subclasses
        return [(name, value)]
    return [
        (name + suffix, leaf) for suffix, leaf in leaves_of(value) if isinstance(leaf, torch.Tensor)
    ]


def leaves_of(
    value: object, is_leaf: Callable[[object], bool] | None = None
) -> list[tuple[str, object]]:
    """The leaves of nested containers with their paths, such as ``['h'][0]``; "" for a value that is none.

    Args:
        is_leaf: containers to take as leaves.
    """
    try:
        found, _ = pytree.tree_flatten_with_path(value, is_leaf)
    except ValueError:  # a class was registered without names for its children, which is allowed
        return [(f" (leaf {i})", leaf) for i, leaf in enumerate(pytree.tree_leaves(value, is_leaf))]
    return [(pytree.keystr(path), leaf) for path, leaf in found]


def register_containers(values: Sequence[object], classes: Sequence[type]) -> None:
    """Make the instances of ``classes`` in ``values`` visible to torch's pytree.

    A dataclass is its fields, another class its instance attributes by name. The registration stays for the process, as
    ``torch.utils._pytree.register_pytree_node`` has it: without it a call could not be told from another by its tensors.
    """
    if not classes:
        return
    pending = list(values)
    while pending:  # a registered class may hold others
        leaves = pytree.tree_leaves(pending)
        opaque = {type(leaf) for leaf in leaves if isinstance(leaf, tuple(classes))}
        pending = [leaf for leaf in leaves if type(leaf) in opaque]
        for each in opaque:
            _register(each)


def _register(kind: type) -> None:
    def children(value: object) -> tuple[list[object], tuple[str, ...]]:
        names = _attribute_names(value)
        return [getattr(value, name) for name in names], names

    def with_keys(value: object) -> tuple[list[tuple[Any, object]], tuple[str, ...]]:
        found, names = children(value)
        return list(zip(map(pytree.GetAttrKey, names), found, strict=True)), names

    def rebuilt(found: Iterable[object], names: tuple[str, ...]) -> object:
        value: object = object.__new__(kind)
        for name, child in zip(names, found, strict=True):
            object.__setattr__(value, name, child)
        return value

    pytree.register_pytree_node(
        kind,
        children,
        rebuilt,
        serialized_type_name=f"{kind.__module__}.{kind.__qualname__}",
        flatten_with_keys_fn=with_keys,
    )


def _attribute_names(value: object) -> tuple[str, ...]:
    if dataclasses.is_dataclass(value):
        return tuple(f.name for f in dataclasses.fields(value) if hasattr(value, f.name))
    return tuple(sorted(vars(value)))
