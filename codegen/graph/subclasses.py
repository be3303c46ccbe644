"""Tensor subclasses. In: a tensor. Out: the tensors that it is made of and what its class says beside them, as torch's compiler takes it apart."""

from __future__ import annotations

import torch


def taken_apart(tensor: object) -> tuple[dict[str, torch.Tensor], object] | None:
    """The inner tensors of a subclass by name, and its settings; None for what is not made of others."""
    flatten = getattr(type(tensor), "__tensor_flatten__", None)
    if flatten is None:
        return None
    names, settings = flatten(tensor)
    return {name: getattr(tensor, name) for name in names}, settings
