"""A call's arguments: their names, and what can't be traced."""

import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch.utils import _pytree as pytree

from piecework.errors import CaptureError
from piecework.runtime import torch_compat

KIND = {
    inspect.Parameter.POSITIONAL_ONLY: "/",
    inspect.Parameter.POSITIONAL_OR_KEYWORD: "",
    inspect.Parameter.VAR_POSITIONAL: "*",
    inspect.Parameter.KEYWORD_ONLY: "k",
    inspect.Parameter.VAR_KEYWORD: "**",
}


def leaves_of(
    value: object, is_leaf: Callable[[object], bool] | None = None
) -> list[tuple[str, object]]:
    """The leaves of nested containers with their paths, such as ``['h'][0]``; "" for a leaf."""
    try:
        found, _ = pytree.tree_flatten_with_path(value, is_leaf)
    except ValueError:  # a class was registered without names for its children, which is allowed
        return [(f" (leaf {i})", leaf) for i, leaf in enumerate(pytree.tree_leaves(value, is_leaf))]
    return [(pytree.keystr(path), leaf) for path, leaf in found]


def signature_of(model: Callable[..., object]) -> inspect.Signature | None:
    """What a model takes; None where there is none to read, as of a callable written in C."""
    function = model.forward if isinstance(model, torch.nn.Module) else model
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        return None


def argument_names(
    model: Callable[..., object], args: Sequence[object], kwargs: Mapping[str, object]
) -> dict[str, str]:
    """What Dynamo calls each argument of the function that is traced → its parameter's name."""
    signature = signature_of(model)
    parameters = [] if signature is None else list(signature.parameters.values())
    positional = [p.name for p in parameters if KIND[p.kind] in ("/", "")]
    rest = next((p.name for p in parameters if KIND[p.kind] == "*"), "args")
    names = itertools.chain(positional, (f"{rest}[{n}]" for n in itertools.count()))
    by_place = {f"L['args'][{n}]": name for n, name in zip(range(len(args)), names, strict=False)}
    return by_place | {f"L['kwargs'][{name!r}]": name for name in kwargs}


def require_traceable(
    model: Callable[..., object], args: Sequence[object], kwargs: Mapping[str, object]
) -> None:
    """Raise `CaptureError` if an argument holds what torch traces wrongly or as a constant."""
    names = argument_names(model, args, kwargs).values()
    for name, value in zip(names, [*args, *kwargs.values()], strict=True):
        for suffix, each in leaves_of(value, is_leaf=lambda x: bool(_untraceable(x))):
            kind = _untraceable(each)
            if kind:
                why = f"argument {name}{suffix} is a {kind}, which can't be traced"
                hint = (
                    "pass a plain, dense torch.Tensor (of a torch.Size a tuple); pad what is nested"
                )
                raise CaptureError(why, hint=hint)


def _untraceable(value: object) -> str:
    """What ``value`` is, if torch traces it wrongly or as a constant; "" if it does not."""
    kind = type(value)
    if kind is torch.Tensor and (value.is_nested or value.is_quantized):  # type: ignore[attr-defined]
        return "nested tensor" if value.is_nested else "quantized tensor"  # type: ignore[attr-defined]
    if isinstance(value, torch.Tensor):
        if kind in (torch.Tensor, torch.nn.Parameter) or torch_compat.is_fake(value):
            return "" if value.layout is torch.strided else f"tensor of layout {value.layout}"
    elif kind is not torch.Size and not (
        kind.__module__ == "numpy" and hasattr(value, "__array__")
    ):
        return ""
    return f"{kind.__module__}.{kind.__qualname__}"
