"""The example call, and where each placeholder comes from, which it is named after."""

import dis
import itertools
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.fx
from torch.utils import _pytree as pytree

from piecework.errors import CaptureError
from piecework.runtime import torch_compat
from piecework.runtime.torch_compat import Place
from piecework.runtime.trace.arguments import argument_names, leaves_of
from piecework.runtime.watch.guards import models_code
from piecework.runtime.watch.places import place_text, readable
from piecework.runtime.watch.reachable import tensors_of
from piecework.runtime.watch.weights import Weight, out_of_reach

_SIZE_SOURCE = re.compile(r"(?P<tensor>.+)\.size\(\)\[(?P<dim>\d+)\]")
_LAYOUT_SOURCE = re.compile(r"(?P<tensor>.+)\.(?:stride\(\)\[(?P<dim>\d+)\]|storage_offset\(\))")


@dataclass(frozen=True, slots=True)
class Argument:
    """A graph input that is number ``leaf`` of the call's flattened arguments."""

    leaf: int
    name: str


@dataclass(frozen=True, slots=True)
class Size:
    """A graph input that is dimension ``dim`` of tensor argument ``leaf``."""

    leaf: int
    dim: int
    name: str


@dataclass(frozen=True, slots=True)
class Layout:
    """A graph input that is the stride of ``dim`` of argument ``leaf``, or its offset (None)."""

    leaf: int
    dim: int | None
    name: str


GraphInput = Weight | Argument | Size | Layout


class UnreachableInput(CaptureError):
    """The graph takes a number that no emitted code could find again."""


class Example:
    """The call that a model is traced with, and the tensors that the model holds."""

    def __init__(
        self, model: Callable[..., object], args: Sequence[object], kwargs: Mapping[str, object]
    ) -> None:
        self.call = model, args, kwargs
        self.leaves = pytree.tree_leaves((tuple(args), dict(kwargs)))  # the flattened arguments
        self.whole = argument_names(model, args, kwargs)  # of arguments: Dynamo's names → a user's
        given = zip(self.whole.items(), (*args, *kwargs.values()), strict=True)
        paths = [(*names, at) for names, value in given for at, _ in leaves_of(value)]
        self.names = tuple(name + at for _, name, at in paths)  # what a user calls each leaf
        self.sources = {source + at: n for n, (source, _, at) in enumerate(paths)}  # and Dynamo
        self.held = tensors_of(model)  # by identity, with their paths
        self.first: dict[int, int] = {}  # identity → the first argument that a tensor is
        for index, leaf in enumerate(self.leaves):
            if isinstance(leaf, torch.Tensor):
                self.first.setdefault(id(leaf), index)


def trace_back(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[object],
    example: Example,
    place_of: Callable[[torch.fx.Node, torch.Tensor], Place],
) -> tuple[GraphInput, ...]:
    """Where each placeholder of ``gm`` comes from."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    found: list[GraphInput | None] = []
    sizes: dict[str, tuple[int, int]] = {}  # symbol → the first argument and dimension of that size
    for node, value in zip(placeholders, example_inputs, strict=True):
        known = example.first.get(id(value))
        if not isinstance(value, torch.Tensor):
            found.append(None)
        elif known is None:
            source = torch_compat.placeholder_source(node)
            if id(value) not in example.held:
                _refuse_unknown_holder(source, example)
            way = place_of(node, value)
            path = place_text(way) if way else readable(source)
            found.append(Weight(*example.held.get(id(value), (path, value)), way))
        else:
            found.append(Argument(known, example.names[known]))
            for dim, size in enumerate(node.meta["example_value"].shape):
                symbol = torch_compat.symbol_of(size)
                if symbol is not None:
                    sizes.setdefault(symbol, (known, dim))
    # An argument or a weight that is called so keeps its name.
    taken = {*example.names, *(each.path for each in found if isinstance(each, Weight))}
    free = (name for n in itertools.count() if (name := f"s{n}") not in taken)
    return tuple(
        each or _size_or_int(node, sizes, example, next(free))
        for node, each in zip(placeholders, found, strict=True)
    )


def _refuse_unknown_holder(source: str, example: Example) -> None:
    """Refuse a tensor in an argument whose content nobody can list: a call could not find it."""
    for place, leaf in example.sources.items():
        if source.startswith((f"{place}.", f"{place}[")):
            kind = type(example.leaves[leaf]).__qualname__.rpartition("<locals>.")[2]
            why = f"argument {example.names[leaf]} is a {kind}, a class that torch's pytree does not know, and the model reads a tensor of it"
            hint = f"register it: torch.utils._pytree.register_dataclass({kind}) for a dataclass, else register_pytree_node; or pass its tensors"
            raise CaptureError(why, hint=hint)


def _size_or_int(
    node: torch.fx.Node, sizes: dict[str, tuple[int, int]], example: Example, name: str
) -> GraphInput:
    symbol = torch_compat.symbol_of(node.meta["example_value"])
    if symbol in sizes:
        return Size(*sizes[symbol], name)
    source, sources = torch_compat.placeholder_source(node), example.sources
    size, layout = _SIZE_SOURCE.fullmatch(source), _LAYOUT_SOURCE.fullmatch(source)
    if size is not None and size["tensor"] in sources:  # a size that the trace fixed to a number
        return Size(sources[size["tensor"]], int(size["dim"]), name)
    if size is not None:  # the model's own weights have sizes that are numbers
        raise out_of_reach(readable(size["tensor"]))
    if layout is not None and layout["tensor"] in sources:
        dim = None if layout["dim"] is None else int(layout["dim"])
        return Layout(sources[layout["tensor"]], dim, name)
    leaf = sources.get(source)
    if leaf is not None and type(example.leaves[leaf]) is int:
        return Argument(leaf, example.names[leaf])
    why = f"input {source or node.name} of the graph is neither an argument, a size of one, nor a weight"
    raise UnreachableInput(why, hint="pass it as a tensor, or make it a constant of the model")


def rename(gm: torch.fx.GraphModule, inputs: Sequence[GraphInput]) -> None:
    """Name placeholders after what they are, so that emitted source reads well."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    named = {node.name: node for node in gm.graph.nodes}
    for node, source in zip(placeholders, inputs, strict=True):
        wish = source.path if isinstance(source, Weight) else source.name
        name = re.sub(r"\W", "_", wish).strip("_") or "input"
        if name[0].isdigit():  # a child of a Sequential or ModuleList at the root
            name = f"m_{name}"
        holder = named.get(name)
        if holder is node:
            continue
        if holder is not None:  # an intermediate value gives way; a placeholder keeps its name
            if holder.op == "placeholder":
                node._rename(name)
                continue
            holder._rename(f"{name}_1")
            named[holder.name] = holder
        node.name = name
        named[name] = node


def refuse_texts_of_numbers(code: Iterable[types.CodeType]) -> None:
    """Raise where code makes texts: of ``f"{n}"`` Dynamo gives the integer argument."""
    for each in models_code(code):
        if any(step.opname.startswith("FORMAT_") for step in dis.get_instructions(each)):
            raise UnreachableInput(f"{each.co_qualname} makes a text of a number")
