"""Where each placeholder of a traced graph comes from: an argument, a size of one, or a weight, which it is named after."""

from __future__ import annotations

import dis
import inspect
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
from piecework.runtime.watch.guards import models_code
from piecework.runtime.watch.places import readable
from piecework.runtime.watch.values import Path
from piecework.runtime.watch.weights import Weight, out_of_reach


@dataclass(frozen=True, slots=True)
class Argument:
    """A graph input that is the call's argument number ``leaf``, counted over the flattened arguments."""

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
    """A graph input that tells how tensor argument ``leaf`` lies in memory: the stride of ``dim``, or where it begins (None)."""

    leaf: int
    dim: int | None
    name: str


GraphInput = Weight | Argument | Size | Layout


class UnreachableInput(CaptureError):
    """The graph takes a number that no emitted code could find again, such as an attribute of an argument."""


def refuse_texts_of_numbers(code: Iterable[types.CodeType]) -> None:
    """Raise where code makes a text of one value alone, as ``f"{n}"``: of an integer argument,
    Dynamo returns the integer.
    """
    for each in models_code(code):
        steps = list(dis.get_instructions(each))
        for at, step in enumerate(steps):
            if step.opname.startswith("FORMAT_") and _is_alone(steps[at + 1 :]):
                raise UnreachableInput(f"{each.co_qualname} makes a text of a number")


def _is_alone(steps: Iterable[dis.Instruction]) -> bool:
    """Whether what lies on top of the stack before ``steps`` is no part of a longer text."""
    above = 0
    for step in steps:
        if step.opname.startswith("BUILD_") and step.arg is not None and step.arg > above:
            return step.opname != "BUILD_STRING"
        given = step.arg if step.opcode >= dis.HAVE_ARGUMENT else None
        above += dis.stack_effect(step.opcode, given)
        if above < 0:
            break
    return True


_SIZE_SOURCE = re.compile(r"(?P<tensor>.+)\.size\(\)\[(?P<dim>\d+)\]")
_LAYOUT_SOURCE = re.compile(r"(?P<tensor>.+)\.(?:stride\(\)\[(?P<dim>\d+)\]|storage_offset\(\))")


def signature_of(model: Callable[..., object]) -> inspect.Signature | None:
    """What a model takes; None where there is none to read, as of a callable written in C."""
    function = model.forward if isinstance(model, torch.nn.Module) else model
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        return None


def leaf_names(
    model: Callable[..., object], args: Sequence[object], kwargs: Mapping[str, object]
) -> tuple[str, ...]:
    """A name for each flattened argument: the parameter's, with a path into containers."""
    signature = signature_of(model)
    parameters = [] if signature is None else list(signature.parameters.values())
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    positional = [p.name for p in parameters if p.kind in plain]
    rest = next((p.name for p in parameters if p.kind is inspect.Parameter.VAR_POSITIONAL), "args")
    names: list[str] = []
    for index, arg in enumerate(args):
        beyond = index - len(positional)
        base = positional[index] if beyond < 0 else f"{rest}[{beyond}]"
        names += [base + suffix for suffix in _suffixes(arg)]
    for key, value in kwargs.items():
        names += [key + suffix for suffix in _suffixes(value)]
    return tuple(names)


def leaf_sources(args: Sequence[object], kwargs: Mapping[str, object]) -> list[str]:
    """What Dynamo calls each flattened argument of `_call_model`."""
    found = [f"L['args'][{i}]{suffix}" for i, arg in enumerate(args) for suffix in _suffixes(arg)]
    return found + [
        f"L['kwargs'][{k!r}]{s}" for k, value in kwargs.items() for s in _suffixes(value)
    ]


def require_traceable(
    model: Callable[..., object], args: Sequence[object], kwargs: Mapping[str, object]
) -> None:
    """Raise `CaptureError` if an argument is, or holds, something that torch traces wrongly or as a constant."""
    names = leaf_names(model, [None] * len(args), dict.fromkeys(kwargs))
    for name, value in zip(names, [*args, *kwargs.values()], strict=True):
        for suffix, each in leaves_of(value, is_leaf=lambda x: bool(_untraceable(x))):
            kind = _untraceable(each)
            if kind:
                raise CaptureError(
                    f"argument {name}{suffix} is a {kind}, which can't be traced",
                    hint="pass a plain, dense torch.Tensor (of a torch.Size a tuple); pad what is nested",
                )


def _untraceable(value: object) -> str:
    """What kind of thing ``value`` is, if torch traces it wrongly or as a constant; "" if it does not."""
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


def _suffixes(value: object) -> list[str]:
    return [suffix for suffix, _ in leaves_of(value)]


def trace_back(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[object],
    leaves: Sequence[object],
    names: Sequence[str],
    sources: Mapping[str, int],
    held: dict[int, tuple[str, torch.Tensor]],
    path_of: Callable[[torch.fx.Node], Path],
) -> tuple[GraphInput, ...]:
    """Where each placeholder of ``gm`` comes from.

    Args:
        path_of: how the model's code reached a tensor that is an input.
    """
    by_identity: dict[int, int] = {}
    for index, leaf in enumerate(leaves):
        if isinstance(leaf, torch.Tensor):
            by_identity.setdefault(id(leaf), index)
    placeholders = gm.graph.find_nodes(op="placeholder")
    found: list[GraphInput | None] = []
    for node, example in zip(placeholders, example_inputs, strict=True):
        if isinstance(example, torch.Tensor) and id(example) in by_identity:
            leaf = by_identity[id(example)]
            found.append(Argument(leaf, names[leaf]))
        elif isinstance(example, torch.Tensor):
            source = torch_compat.placeholder_source(node)
            if id(example) not in held:
                _refuse_unknown_holder(source, leaves, names, sources)
            path, tensor = held.get(id(example), (readable(source), example))
            found.append(Weight(path, tensor, path_of(node)))
        else:
            found.append(None)
    tensors = [
        (g.leaf, node)
        for g, node in zip(found, placeholders, strict=True)
        if isinstance(g, Argument)
    ]
    sizes = _sizes(tensors)
    # An argument or a weight that is called so keeps its name.
    taken = {*names, *(each.path for each in found if isinstance(each, Weight))}
    free = (name for n in itertools.count() if (name := f"s{n}") not in taken)
    for index, node in enumerate(placeholders):
        if found[index] is None:
            found[index] = _size_or_int(node, sizes, leaves, names, sources, next(free))
    return tuple(g for g in found if g is not None)


def _refuse_unknown_holder(
    source: str, leaves: Sequence[object], names: Sequence[str], sources: Mapping[str, int]
) -> None:
    """Refuse a tensor that lies in an argument of a class whose content nobody can list: in a call it could not be found again."""
    for place, leaf in sources.items():
        if source.startswith((f"{place}.", f"{place}[")):
            kind = type(leaves[leaf]).__qualname__.rpartition("<locals>.")[2]
            raise CaptureError(
                f"argument {names[leaf]} is a {kind}, a class that torch's pytree does not know, and the model reads a tensor of it",
                hint=f"register it: torch.utils._pytree.register_dataclass({kind}) for a dataclass, else register_pytree_node; or pass its tensors",
            )


def _sizes(tensors: Sequence[tuple[int, torch.fx.Node]]) -> dict[str, tuple[int, int]]:
    """Symbol → the first argument and dimension that it is the size of."""
    sizes: dict[str, tuple[int, int]] = {}
    for leaf, node in tensors:
        value = node.meta["example_value"]
        for dim, size in enumerate(value.shape):
            symbol = torch_compat.symbol_of(size)
            if symbol is not None:
                sizes.setdefault(symbol, (leaf, dim))
    return sizes


def _size_or_int(
    node: torch.fx.Node,
    sizes: dict[str, tuple[int, int]],
    leaves: Sequence[object],
    names: Sequence[str],
    sources: Mapping[str, int],
    name: str,
) -> GraphInput:
    value = node.meta["example_value"]
    symbol = torch_compat.symbol_of(value)
    if symbol in sizes:
        leaf, dim = sizes[symbol]
        return Size(leaf, dim, name)
    source = torch_compat.placeholder_source(node)
    read = _SIZE_SOURCE.fullmatch(source)
    if read is not None and read["tensor"] in sources:  # a size that the trace fixed to a number
        return Size(sources[read["tensor"]], int(read["dim"]), name)
    if read is not None:  # the model's own weights have sizes that are numbers
        raise out_of_reach(readable(read["tensor"]))
    read = _LAYOUT_SOURCE.fullmatch(source)
    if read is not None and read["tensor"] in sources:
        dim = None if read["dim"] is None else int(read["dim"])
        return Layout(sources[read["tensor"]], dim, name)
    leaf = sources.get(source)
    if leaf is not None and type(leaves[leaf]) is int:
        return Argument(leaf, names[leaf])
    raise UnreachableInput(
        f"input {source or node.name} of the graph is neither an argument, a size of one, nor a weight",
        hint="pass it as a tensor, or make it a constant of the model",
    )


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
