"""Nested containers: their parts, and containers put together again."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils import _pytree

#: The leaves of nested containers in order with what puts them together again, and that.
flatten_tree, unflatten_tree = _pytree.tree_flatten, _pytree.tree_unflatten


def tensors_in(tree: object) -> list[torch.Tensor]:
    return [leaf for leaf in flatten_tree(tree)[0] if isinstance(leaf, torch.Tensor)]


def spec_parts(spec: _pytree.TreeSpec) -> tuple[type | None, object, list[_pytree.TreeSpec]]:
    """Type, context and children of a structure; the type of a leaf is None."""
    if spec.is_leaf():
        return None, None, []
    return spec.type, spec.context, list(spec.children())


def rebuilder(kind: type) -> Callable[[list[object], object], object] | None:
    """What puts a container of a registered type together."""
    node = _pytree.SUPPORTED_NODES.get(kind)
    return getattr(node, "unflatten_fn", None)


def with_children(children: list[object], spec: _pytree.TreeSpec) -> object:
    """A container of ``spec``'s kind around ``children`` that are put together already."""
    leaf = _pytree.tree_structure(0)
    shallow = _pytree.TreeSpec(spec.type, spec.context, [leaf for _ in children])
    return _pytree.tree_unflatten(children, shallow)
