"""Nested containers: their leaves, and containers put together again."""

import torch
from torch.utils import _pytree

#: The leaves of nested containers in order with what puts them together again, and that.
flatten_tree, unflatten_tree = _pytree.tree_flatten, _pytree.tree_unflatten


def tensors_in(tree: object) -> list[torch.Tensor]:
    return [leaf for leaf in flatten_tree(tree)[0] if isinstance(leaf, torch.Tensor)]
