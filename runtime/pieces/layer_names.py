"""Makes pieces that differ only in a layer's name one program, which takes it as an input."""

import re
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch._ops import OpOverload
from torch.fx import GraphModule

from piecework.codegen.graph.origin import value_of
from piecework.codegen.graph.schemas import overloads_of
from piecework.codegen.graph.structure import input_signature, new_placeholder, structure_of
from piecework.codegen.split.splitting import SplitItem
from piecework.runtime import torch_compat

NAMESPACE = "piecework_named"
_BLOCK = 64  # names are padded to a multiple, so that names of nearly the same length are one shape


class _Name(NamedTuple):
    """A string that a node of a piece gives to its operator."""

    position: int
    argument: str
    text: str


def share_layer_names(split_gm: GraphModule, items: Sequence[SplitItem]) -> None:
    """Make pieces equal, in place, that are so up to strings given to custom operators."""
    groups: dict[tuple[str, ...], list[tuple[SplitItem, list[_Name]]]] = {}
    for item in items:
        names = [] if item.is_splitting_graph else _names_in(item.graph)
        if names and _fake_mode(item.graph) is not None:
            groups.setdefault(_form_without(names, item.graph), []).append((item, names))
    for group in groups.values():
        for column in zip(*(names for _, names in group), strict=True):
            if len({each.text for each in column}) > 1:
                for (item, _), name in zip(group, column, strict=True):
                    _take_as_input(split_gm, item, name, column[0].text)
                split_gm.recompile()


def _names_in(piece: GraphModule) -> list[_Name]:
    """The strings given to operators that a compiler would call as they are."""
    found = []
    for position, node in enumerate(piece.graph.nodes):
        overloads = overloads_of(node.target) if node.op == "call_function" else ()
        if len(overloads) != 1 or not torch_compat.is_opaque_to_inductor(overloads[0]):
            continue
        schema = overloads[0]._schema
        if any(each.alias_info is not None for each in schema.returns):
            continue
        given = dict(zip((each.name for each in schema.arguments), node.args, strict=False))
        given |= node.kwargs
        texts = [each.name for each in schema.arguments if str(each.type) == "str"]
        found += [_Name(position, n, given[n]) for n in texts if type(given.get(n)) is str]
    return found


def _fake_mode(piece: GraphModule) -> Any:
    values = map(value_of, piece.graph.find_nodes(op="placeholder"))
    return next((m for each in values if (m := getattr(each, "fake_mode", None))), None)


def _form_without(names: Sequence[_Name], piece: GraphModule) -> tuple[str, ...]:
    """The piece's lines without the names, and what tracing recorded for each node."""
    lines = list(structure_of(piece, describe_input=input_signature).lines)
    for name in names:
        lines[name.position] = lines[name.position].replace(f"str:{name.text!a}", "str:<name>")
    return *lines, *(_described(value_of(node)) for node in piece.graph.nodes)


def _described(value: object) -> str:
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(_described, value))})"
    if isinstance(value, torch.Tensor):
        layout = value.shape, value.stride(), value.storage_offset()
        return f"{value.dtype} {value.device} {layout}"
    return f"{type(value).__qualname__} {value}"


def _take_as_input(split_gm: GraphModule, item: SplitItem, name: _Name, first: str) -> None:
    """Give the piece an input for a name; the call itself gets that of the ``first`` piece."""
    graph = item.graph.graph
    inputs = graph.find_nodes(op="placeholder")
    # Inputs added before stand behind the others: positions are those without them.
    added = sum(each.name.endswith("_as_bytes") for each in inputs)
    node = list(graph.nodes)[name.position + added]
    (call,) = split_gm.graph.find_nodes(op="call_module", target=item.submod_name)
    data = name_tensor(name.text)
    attribute = "name_" + re.sub(r"\W", "_", name.text, flags=re.ASCII)
    while not torch.equal(getattr(split_gm, attribute, data), data):
        attribute += "_"
    split_gm.register_buffer(attribute, data, persistent=False)
    fake = _fake_mode(item.graph).from_tensor(data, static_shapes=True)
    with graph.inserting_after(inputs[-1]):
        taken = new_placeholder(graph, f"{name.argument}_{added}_as_bytes")
    with split_gm.graph.inserting_before(call):
        passed = split_gm.graph.get_attr(attribute)
    taken.meta["example_value"] = passed.meta["example_value"] = fake
    call.args = (*call.args, passed)
    (op,) = overloads_of(node.target)
    if name.argument in node.kwargs:
        node.update_kwarg(name.argument, first)
    else:
        node.update_arg([each.name for each in op._schema.arguments].index(name.argument), first)
    node.kwargs = {**node.kwargs, f"{name.argument}_as_bytes": taken}
    node.target = named_operator(op, name.argument)
    item.graph.recompile()


def name_tensor(text: str) -> torch.Tensor:
    """``text`` as UTF-8 bytes in a CPU tensor, padded with zeros."""
    data = text.encode("utf-8")
    padded = data.ljust(-(-(len(data) + 1) // _BLOCK) * _BLOCK, b"\0")
    return torch.frombuffer(bytearray(padded), dtype=torch.uint8)


def name_of(data: torch.Tensor) -> str:
    return data.numpy().tobytes().rstrip(b"\0").decode("utf-8")


# Both mirror torch's own operator registry, which compiled code refers to as long as it lives.
@cache
def _library() -> torch.library.Library:
    return torch.library.Library(NAMESPACE, "FRAGMENT")


@cache
def named_operator(original: OpOverload, argument: str) -> OpOverload:
    """``original`` with a tensor at the end that holds ``argument``; shapes go by the call."""
    schema, extra = original._schema, f"{argument}_as_bytes"
    place = [each.name for each in schema.arguments].index(argument)

    def run(*args: object, **kwargs: object) -> object:
        data = kwargs.pop(extra)
        assert isinstance(data, torch.Tensor)
        if place >= len(args):  # the dispatcher leaves out trailing arguments at their default
            return original(*args, **{**kwargs, argument: name_of(data)})
        return original(*args[:place], name_of(data), *args[place + 1 :], **kwargs)

    def fake(*args: object, **kwargs: object) -> object:
        del kwargs[extra]
        return original(*args, **kwargs)

    own = "__".join([*schema.name.split("::"), original._overloadname, argument])
    text = str(schema)
    head, arrow, returns = text[text.index("(") :].rpartition(" -> ")
    star = "" if any(each.kwarg_only for each in schema.arguments) else ", *"
    tags = tuple(original.tags)
    _library().define(f"{own}{head[:-1]}{star}, Tensor {extra}){arrow}{returns}", tags=tags)
    _library().impl(own, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{own}", fake, lib=_library())
    return getattr(getattr(torch.ops, NAMESPACE), own).default  # type: ignore[no-any-return]
