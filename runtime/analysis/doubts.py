"""What a caller may have meant otherwise. In: a model and the arguments of its first call. Out: a warning, or an error where the configuration is strict."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch.utils import _pytree as pytree

from piecework.code_objects import with_inner_code
from piecework.errors import CaptureError, tell


def tell_of_training(model: object, strict: bool) -> None:
    """Say that a model is in training mode, if a module of it goes by that."""
    if not isinstance(model, torch.nn.Module):
        return
    names = [
        f"{name or type(model).__name__} ({type(each).__name__})"
        for name, each in model.named_modules()
        if each.training and _asks_for_training(type(each))
    ]
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        problem = CaptureError(
            f"the model is in training mode, and its module {names[0]}{more} goes by that: what is compiled stays so, with random dropout and norms of each batch",
            hint="call model.eval() before compiling",
        )
        tell(problem, strict=strict)


def tell_of_gradients(values: Sequence[object], strict: bool) -> None:
    """Say that results carry no gradients, if an argument asks for them. Weights always do, and mean nothing."""
    if any(map(_requires_grad, values)) and torch.is_grad_enabled():
        problem = CaptureError(
            "an argument requires grad, and what is compiled records no gradients: its results have no grad_fn, and backward() ends there",
            hint="train the model itself; for inference pass detached tensors, or call under torch.no_grad()",
        )
        tell(problem, strict=strict)


def _requires_grad(value: object) -> bool:
    """Whether ``value`` is a tensor that requires grad, or a container that holds one."""
    if isinstance(value, torch.Tensor):
        return value.requires_grad
    return any(isinstance(x, torch.Tensor) and x.requires_grad for x in pytree.tree_leaves(value))


@cache
def _asks_for_training(kind: type[torch.nn.Module]) -> bool:
    code = getattr(kind.forward, "__code__", None)
    return code is not None and any("training" in each.co_names for each in with_inner_code([code]))
