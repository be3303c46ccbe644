"""Makes pieces that differ only in a layer's name one program, which takes the name as an input.

Layers often hand their own name to an operator (``"layers.3"``), which makes equal layers unequal
programs. Here the operator is replaced by one that reads the name from a tensor and calls the
original one. What tracing derived from the name (shapes of results) is compared node by node
first, and only operators qualify that a compiler calls as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.fx
from torch._ops import OpOverload

from piecework.codegen.graph.origin import value_of
from piecework.codegen.graph.schemas import overloads_of
from piecework.codegen.graph.structure import input_signature, new_placeholder, structure_of
from piecework.codegen.split.split import SplitItem
from piecework.runtime import torch_compat

NAMESPACE = "piecework_named"
_BLOCK = 64  # names are padded to a multiple, so that names of nearly the same length are one shape


@dataclass(frozen=True, slots=True)
class _Hole:
    """A string argument in a piece: the node's position and operator, the argument, the string."""

    position: int
    op: OpOverload
    argument: str
    text: str


@dataclass(frozen=True, slots=True)
class NamedOp:
    """An operator of ours: which operator it stands for, and which arguments it reads from tensors."""

    original: str
    arguments: tuple[str, ...]


def share_layer_names(
    split_gm: torch.fx.GraphModule, items: Sequence[SplitItem]
) -> tuple[NamedOp, ...]:
    """Make pieces that are equal up to strings given to custom operators equal, in place.

    Each such piece gets one more input per string that differs: a tensor with the string's bytes, an attribute of
    ``split_gm`` that its call passes.

    Args:
        split_gm: a stitching graph.
        items: its submodules.

    Returns:
        The operators that the changed pieces call, to be registered (`register_named_op`) before compiled pieces are
        loaded in another process.
    """
    groups: dict[tuple[str, ...], list[tuple[SplitItem, list[_Hole]]]] = {}
    for item in items:
        holes = [] if item.is_splitting_graph else _holes_of(item.graph)
        if holes:
            form = (*_form(item.graph, holes), *_values(item.graph))
            groups.setdefault(form, []).append((item, holes))
    used: dict[NamedOp, None] = {}
    for group in groups.values():
        first_holes = group[0][1]
        different = [
            index
            for index in range(len(first_holes))
            if len({holes[index].text for _, holes in group}) > 1
        ]
        for item, holes in group if different else ():
            chosen = [(holes[i], first_holes[i].text) for i in different]
            used.update(dict.fromkeys(_take_names_as_inputs(split_gm, item, chosen)))
    if used:
        split_gm.recompile()
    return tuple(used)


# --- what may be shared ------------------------------------------------------------------------------


def _holes_of(piece: torch.fx.GraphModule) -> list[_Hole]:
    found: list[_Hole] = []
    for position, node in enumerate(piece.graph.nodes):
        op = _overload(node)
        if op is None:
            continue
        given = dict(zip((each.name for each in op._schema.arguments), node.args, strict=False))
        for name, value in {**given, **node.kwargs}.items():
            if type(value) is str and _is_string(op, name):
                found.append(_Hole(position, op, name, value))
    return found


def _overload(node: torch.fx.Node) -> OpOverload | None:
    """The custom operator that ``node`` calls, if a compiler would call it as it is."""
    op = node.target
    if node.op != "call_function":
        return None
    overloads = overloads_of(op)
    if len(overloads) != 1 or not torch_compat.is_opaque_to_inductor(op := overloads[0]):
        return None
    aliases = any(each.alias_info is not None for each in op._schema.returns)
    return None if aliases or op.namespace == NAMESPACE else op


def _is_string(op: OpOverload, name: str) -> bool:
    return any(each.name == name and str(each.type) == "str" for each in op._schema.arguments)


def _form(piece: torch.fx.GraphModule, holes: Sequence[_Hole]) -> tuple[str, ...]:
    """The piece's canonical lines with the strings left out."""
    lines = list(structure_of(piece, describe_input=input_signature).lines)
    for hole in holes:
        text = lines[hole.position].replace(f"str:{hole.text!a}", "str:<name>")
        lines[hole.position] = text
    return tuple(lines)


def _values(piece: torch.fx.GraphModule) -> list[str]:
    """What tracing recorded for each node: everything that a result's form could tell of a name."""

    def describe(value: object) -> str:
        if isinstance(value, (tuple, list)):
            return f"({', '.join(map(describe, value))})"
        if isinstance(value, torch.Tensor):
            layout = (value.shape, value.stride(), value.storage_offset())
            return f"{value.dtype} {value.device} {layout}"
        return f"{type(value).__qualname__} {value}"

    return [describe(value_of(node)) for node in piece.graph.nodes]


# --- the change --------------------------------------------------------------------------------------


def _take_names_as_inputs(
    split_gm: torch.fx.GraphModule, item: SplitItem, chosen: Sequence[tuple[_Hole, str]]
) -> list[NamedOp]:
    """Give the piece one input per hole; the string in its place becomes that of the group's first piece."""
    piece = item.graph
    placeholders = piece.graph.find_nodes(op="placeholder")
    modes = (getattr(value_of(node), "fake_mode", None) for node in placeholders)
    mode = next((each for each in modes if each is not None), None)
    (call,) = split_gm.graph.find_nodes(op="call_module", target=item.submod_name)
    if mode is None:
        return []
    nodes = list(piece.graph.nodes)
    by_node: dict[int, list[tuple[_Hole, str]]] = {}
    for hole, first in chosen:
        by_node.setdefault(hole.position, []).append((hole, first))
    used: list[NamedOp] = []
    last = placeholders[-1]
    # Equal strings of one piece may be different ones in another, so each hole has an input of its own.
    for number, (position, holes) in enumerate(sorted(by_node.items())):
        node, op = nodes[position], holes[0][0].op
        named = NamedOp(
            f"{op._schema.name}.{op._overloadname}", tuple(h.argument for h, _ in holes)
        )
        tensors: dict[str, torch.fx.Node] = {}
        for hole, first in holes:
            attribute = _attribute_for(split_gm, hole.text)
            fake = mode.from_tensor(getattr(split_gm, attribute), static_shapes=True)
            with piece.graph.inserting_after(last):
                last = new_placeholder(piece.graph, f"{hole.argument}_{number}_as_bytes")
            last.meta["example_value"] = fake
            with split_gm.graph.inserting_before(call):
                passed = split_gm.graph.get_attr(attribute)
            passed.meta["example_value"] = fake
            call.args = (*call.args, passed)
            tensors[f"{hole.argument}_as_bytes"] = last
            _set_argument(node, op, hole.argument, first)
        node.target = register_named_op(named)
        node.kwargs = {**node.kwargs, **tensors}
        used.append(named)
    piece.graph.lint()
    piece.recompile()
    return used


def _set_argument(node: torch.fx.Node, op: OpOverload, name: str, value: str) -> None:
    if name in node.kwargs:
        node.kwargs = {**node.kwargs, name: value}
        return
    place = [each.name for each in op._schema.arguments].index(name)
    node.args = (*node.args[:place], value, *node.args[place + 1 :])


def _attribute_for(split_gm: torch.fx.GraphModule, text: str) -> str:
    """The attribute of ``split_gm`` that holds ``text`` as bytes, made if there is none."""
    data = name_tensor(text)
    stem = "name_" + "".join(c if c.isalnum() and c.isascii() else "_" for c in text)
    number = 0
    while True:
        attribute = stem if number == 0 else f"{stem}_{number}"
        held = getattr(split_gm, attribute, None)
        if held is None:
            split_gm.register_buffer(attribute, data, persistent=False)
            return attribute
        if isinstance(held, torch.Tensor) and torch.equal(held, data):
            return attribute
        number += 1


def name_tensor(text: str) -> torch.Tensor:
    """``text`` as UTF-8 bytes in a CPU tensor, padded with zeros."""
    data = text.encode("utf-8")
    padded = data.ljust(max(_BLOCK, -(-(len(data) + 1) // _BLOCK) * _BLOCK), b"\0")
    return torch.frombuffer(bytearray(padded), dtype=torch.uint8)


def name_of(data: torch.Tensor) -> str:
    """The inverse of `name_tensor`."""
    return data.numpy().tobytes().rstrip(b"\0").decode("utf-8")


# --- the operators -----------------------------------------------------------------------------------


# Both mirror torch's own operator registry, which is one per process: compiled code refers to an operator as long as that lives.


@cache
def _library() -> torch.library.Library:
    return torch.library.Library(NAMESPACE, "FRAGMENT")


@cache
def register_named_op(named: NamedOp) -> OpOverload:
    """The operator for ``named``, registered at first use; the one that it stands for must be registered already."""
    name, _, overload = named.original.rpartition(".")
    namespace, _, short = name.partition("::")
    original = getattr(getattr(getattr(torch.ops, namespace), short), overload or "default")
    own = "__".join([namespace, short, overload or "default", *named.arguments])
    schema = own + _schema_with_names(original, named.arguments)
    _library().define(schema, tags=tuple(original.tags))
    run, fake = _implementations(original, named.arguments)
    _library().impl(own, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{own}", fake, lib=_library())
    return getattr(getattr(torch.ops, NAMESPACE), own).default


def _schema_with_names(original: OpOverload, arguments: Iterable[str]) -> str:
    """The schema of ``original`` without its name, with a tensor per name argument at the end."""
    schema = original._schema
    text = str(schema)
    head, arrow, returns = text[text.index("(") :].rpartition(" -> ")
    star = "" if any(each.kwarg_only for each in schema.arguments) else ", *"
    added = "".join(f", Tensor {name}_as_bytes" for name in arguments)
    return f"{head[:-1]}{star}{added}){arrow}{returns}"


def _implementations(
    original: OpOverload, arguments: tuple[str, ...]
) -> tuple[Callable[..., object], Callable[..., object]]:
    """What runs, with the names that the tensors hold, and what tells shapes, with the names in the call."""
    order = [each.name for each in original._schema.arguments]
    places = [(name, order.index(name), f"{name}_as_bytes") for name in arguments]

    def run(*args: object, **kwargs: object) -> object:
        values = list(args)
        for name, place, tensor in places:
            data = kwargs.pop(tensor)
            assert isinstance(data, torch.Tensor)
            if place < len(values):
                values[place] = name_of(data)
            else:  # the dispatcher leaves out trailing arguments that are at their default
                kwargs[name] = name_of(data)
        return original(*values, **kwargs)

    def fake(*args: object, **kwargs: object) -> object:
        for _, _, tensor in places:
            del kwargs[tensor]
        return original(*args, **kwargs)

    return run, fake
