"""The parameters of a model, each with what the trace made of its argument; example arguments are looked at by structure only."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence

from torch.utils import _pytree as pytree

from piecework.codegen.entry.plan import Assumption, FixedValue, Items, Leaf, Node, Parameter, Tree
from piecework.codegen.plan.literals import is_inline_literal
from piecework.runtime.trace.inputs import leaves_of, signature_of

Assume = Callable[[int, object], Assumption]

_KIND = {
    inspect.Parameter.POSITIONAL_ONLY: "/",
    inspect.Parameter.POSITIONAL_OR_KEYWORD: "",
    inspect.Parameter.VAR_POSITIONAL: "*",
    inspect.Parameter.KEYWORD_ONLY: "k",
    inspect.Parameter.VAR_KEYWORD: "**",
}


def parameters_of(
    model: Callable[..., object],
    args: Sequence[object],
    kwargs: Mapping[str, object],
    assume: Assume,
) -> tuple[Parameter, ...]:
    """The model's parameters, each with what the trace assumed of its argument.

    Args:
        args, kwargs: the example call; leaves are counted over ``(args, kwargs)`` as pytree flattens them.
        assume: leaf number and example value → assumption.
    """
    signature = signature_of(model) or _ANY_ARGUMENTS
    try:
        given = signature.bind(*args, **kwargs).arguments
    except TypeError:
        signature = _ANY_ARGUMENTS
        given = signature.bind(*args, **kwargs).arguments
    numbering = _Numbering(args, kwargs, assume)
    found = []
    positional = 0
    for parameter in signature.parameters.values():
        name, kind = parameter.name, _KIND[parameter.kind]
        has_default = parameter.default is not inspect.Parameter.empty
        default = FixedValue(parameter.default) if has_default else None
        if kind == "*":
            values = given.get(name, ())
            places = range(positional, positional + len(values))
            children = tuple(numbering.positional(i, f"{name}[{i - positional}]") for i in places)
            node: Node = Items(tuple, name, tuple(range(len(values))), children)
        elif kind == "**":
            keys = tuple(given.get(name, {}))
            node = Items(dict, name, keys, tuple(numbering.named(key, key) for key in keys))
        elif name in kwargs and kind != "/":
            node = numbering.named(name, name)
        elif name in given:
            node = numbering.positional(positional, name)
            positional += 1
        else:
            node = Leaf(-1, name, FixedValue(parameter.default))
        found.append(Parameter(name, kind, node, default))
    return tuple(found)


def _any_arguments(*args: object, **kwargs: object) -> None:
    """What a callable without a readable signature is taken for."""


_ANY_ARGUMENTS = inspect.signature(_any_arguments)


class _Numbering:
    """Gives each leaf the number that flattening ``(args, kwargs)`` gives it."""

    def __init__(
        self, args: Sequence[object], kwargs: Mapping[str, object], assume: Assume
    ) -> None:
        self._assume = assume
        self._args = list(args)
        self._kwargs = dict(kwargs)
        self._first: dict[object, int] = {}
        count = 0
        for key, value in [*enumerate(args), *kwargs.items()]:
            self._first[key] = count
            count += len(pytree.tree_leaves(value))

    def positional(self, index: int, label: str) -> Node:
        return self._node(self._args[index], label, self._first[index])[0]

    def named(self, key: str, label: str) -> Node:
        return self._node(self._kwargs[key], label, self._first[key])[0]

    def _node(self, value: object, label: str, index: int) -> tuple[Node, int]:
        """The node for ``value`` and the number of the leaf after it."""
        kind = type(value)
        if kind in (list, tuple):
            keys: tuple[object, ...] = tuple(range(len(value)))  # type: ignore[arg-type]
        elif kind is dict and all(is_inline_literal(key) for key in value):  # type: ignore[attr-defined]
            keys = tuple(value)  # type: ignore[arg-type]
        else:
            return self._other(value, label, index)
        children = []
        for key in keys:
            child, index = self._node(value[key], f"{label}[{key!r}]", index)  # type: ignore[index]
            children.append(child)
        return Items(kind, label, keys, tuple(children)), index

    def _other(self, value: object, label: str, index: int) -> tuple[Node, int]:
        structure = pytree.tree_structure(value)
        if structure.is_leaf():
            return Leaf(index, label, self._assume(index, value)), index + 1
        leaves = leaves_of(value)
        children = tuple(
            Leaf(index + i, label + suffix, self._assume(index + i, leaf))
            for i, (suffix, leaf) in enumerate(leaves)
        )
        return Tree(label, structure, children), index + len(leaves)
