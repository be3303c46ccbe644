"""What Dynamo takes for granted and guards nothing for. In: a trace that is running, its arguments and its result. Out: nothing, or the `CaptureError` that refuses them."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
import torch.fx

from piecework.code_objects import global_names, with_inner_code
from piecework.errors import CaptureError
from piecework.runtime import torch_compat
from piecework.runtime.watch.code import models_names
from piecework.runtime.watch.reachable import modules_of

#: What of a tensor that records gradients a trace can't tell: it sees a leaf, whatever there is.
PLACE_IN_AUTOGRAD = ("is_leaf", "grad_fn", "retains_grad", "_grad_fn", "_backward_hooks")
_VIEWED = "_base"
_OFFSET = "storage_offset"
_DEPTH = 3
_REMEMBERS = type(functools.cache(len))
_CONTAINERS = (list, tuple, dict, set, frozenset)


def refuse_place_in_autograd(leaves: Sequence[object], names: Sequence[str]) -> None:
    """Raise if the code may ask how an argument came to record gradients.

    Of arguments that don't record any, all that can be asked is the same.
    """
    pairs = zip(leaves, names, strict=True)
    recording = [n for leaf, n in pairs if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    asked = torch_compat.trace_names(*PLACE_IN_AUTOGRAD) if recording else []
    if asked:
        raise CaptureError(
            f"forward names {', '.join(asked)}, and argument {recording[0]} records gradients",
            hint="a stitched model serves inference: pass it detached, or decide that outside forward",
        )


def refuse_views() -> None:
    """Raise if the code may ask whether a tensor is a view of another: a trace sees none of an argument's, whatever there is."""
    if _VIEWED in models_names(torch_compat.traced_code()):
        raise CaptureError(
            f"forward names {_VIEWED}, and a trace can't tell whether an argument is a view",
            hint="decide that outside forward",
        )


def refuse_offsets(leaves: Sequence[object], names: Sequence[str]) -> None:
    """Raise if the code may ask where in its memory an argument begins, and one begins behind the start: what it answers then is no size that a call is compared by."""
    views = [
        n
        for leaf, n in zip(leaves, names, strict=True)
        if isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided and leaf.storage_offset()
    ]
    if views and torch_compat.trace_names(_OFFSET):
        raise CaptureError(
            f"forward names {_OFFSET}, and argument {views[0]} is a view behind the start of its memory",
            hint="pass a clone, or decide that outside forward",
        )


def refuse_globals(
    model: Callable[..., object], leaves: Sequence[object], names: Sequence[str]
) -> None:
    """Raise if an argument is a tensor that the code also reaches by a global name.

    Dynamo takes the two for one then, and does not look whether they are in the next call.
    """
    given = {id(leaf): n for n, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)}
    code = torch_compat.traced_code() if given else []
    for scope, each in scopes(model, code):
        named = set(each.co_names)
        for name in named & scope.keys():
            for tensor in _tensors_in(scope[name], named, _DEPTH):
                if id(tensor) in given and name in global_names(each):
                    raise CaptureError(
                        f"argument {names[given[id(tensor)]]} is a tensor that forward also reaches by the global name {name}",
                        hint="pass a clone: a trace can't tell when the two are one",
                    )


def scopes(
    model: Callable[..., object], code: Iterable[types.CodeType]
) -> Iterator[tuple[Mapping[str, object], types.CodeType]]:
    """The global names of traced code: those of the module whose file it is from, and of the model's own functions."""
    by_file = {
        vars(each).get("__file__"): vars(each)
        for each in list(sys.modules.values())
        if isinstance(each, types.ModuleType)
    }
    functions = [model, *(type(m).forward for _, root in modules_of(model) for m in root.modules())]
    by_code = {
        function.__code__: function.__globals__
        for function in functions
        if isinstance(function, types.FunctionType)
    }
    for each in code:
        scope = by_code.get(each) or by_file.get(each.co_filename)
        if scope is not None:
            yield from ((scope, inner) for inner in with_inner_code([each]))


def _tensors_in(value: object, named: set[str], depth: int) -> Iterator[torch.Tensor]:
    """Tensors in plain containers, and those of a module's names that the code has."""
    if isinstance(value, torch.Tensor):
        yield value
    elif depth and (isinstance(value, types.ModuleType) or type(value) in _CONTAINERS):
        if isinstance(value, types.ModuleType):
            inner = [vars(value)[name] for name in named & vars(value).keys()]
        else:
            inner = list(value.values() if isinstance(value, dict) else value)  # type: ignore[call-overload]
        for each in inner:
            yield from _tensors_in(each, named, depth - 1)
