"""A call's arguments: names, what can't be traced, what a trace assumed of each parameter."""

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch.utils import _pytree as pytree

from piecework.codegen.entry.plan import Assumption, FixedValue, Items, Leaf, Node, Parameter, Tree
from piecework.codegen.plan.literals import is_inline_literal
from piecework.errors import CaptureError
from piecework.runtime import torch_compat

Assume = Callable[[int, object], Assumption]

_KIND = {
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
    positional = [p.name for p in parameters if _KIND[p.kind] in ("/", "")]
    rest = next((p.name for p in parameters if _KIND[p.kind] == "*"), "args")
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


def parameters_of(
    model: Callable[..., object],
    args: Sequence[object],
    kwargs: Mapping[str, object],
    assume: Assume,
) -> tuple[Parameter, ...]:
    """The model's parameters, each with what the trace assumed of its argument."""
    signature = signature_of(model) or _ANY_ARGUMENTS
    given = signature.bind(*args, **kwargs).arguments
    values: dict[int | str, object] = {**dict(enumerate(args)), **kwargs}
    counts = [len(pytree.tree_leaves(value)) for value in values.values()]
    first = dict(zip(values, itertools.accumulate(counts, initial=0), strict=False))

    def node(key: int | str, label: str) -> Node:
        return _node(values[key], label, itertools.count(first[key]), assume)

    found, positional = [], 0
    for parameter in signature.parameters.values():
        name, kind = parameter.name, _KIND[parameter.kind]
        has_default = parameter.default is not inspect.Parameter.empty
        default = FixedValue(parameter.default) if has_default else None
        made: Node
        if kind == "*":
            count = len(given.get(name, ()))
            children = tuple(node(positional + i, f"{name}[{i}]") for i in range(count))
            made = Items(tuple, name, tuple(range(count)), children)
        elif kind == "**":
            keys = tuple(given.get(name, {}))
            made = Items(dict, name, keys, tuple(node(key, key) for key in keys))
        elif name in kwargs and kind != "/":
            made = node(name, name)
        elif name in given:
            made = node(positional, name)
            positional += 1
        else:
            made = Leaf(-1, name, FixedValue(parameter.default))
        found.append(Parameter(name, kind, made, default))
    return tuple(found)


#: What a callable without a readable signature takes.
_ANY_ARGUMENTS = inspect.signature(lambda *args, **kwargs: None)


def _node(value: object, label: str, numbers: Iterator[int], assume: Assume) -> Node:
    """The node for ``value``; its leaves take their numbers from ``numbers``."""
    kind = type(value)
    if kind in (list, tuple):
        keys: tuple[object, ...] = tuple(range(len(value)))  # type: ignore[arg-type]
    elif kind is dict and all(is_inline_literal(key) for key in value):  # type: ignore[attr-defined]
        keys = tuple(value)  # type: ignore[arg-type]
    else:
        structure = pytree.tree_structure(value)
        if structure.is_leaf():
            return Leaf(n := next(numbers), label, assume(n, value))
        found = zip(leaves_of(value), numbers, strict=False)
        leaves = tuple(Leaf(n, label + at, assume(n, leaf)) for (at, leaf), n in found)
        return Tree(label, structure, leaves)
    children = tuple(_node(value[k], f"{label}[{k!r}]", numbers, assume) for k in keys)  # type: ignore[index]
    return Items(kind, label, keys, children)
