"""Which submodules become functions of the emitted module; equal bodies share one."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

import torch
import torch.fx
from torch.fx.graph import CodeGen

from piecework.codegen.graph.consts import DICT_TYPES, LIST_TYPES
from piecework.codegen.graph.origin import node_where
from piecework.codegen.graph.structure import Hole, attribute_of, structure_of
from piecework.codegen.plan.literals import is_inline_literal, same_literal
from piecework.codegen.plan.names import is_identifier
from piecework.errors import UnsupportedNode


@dataclass(eq=False, slots=True)
class Inlined:
    """One function to emit, and the submodules (by dotted path) that it stands for."""

    key: str
    path: str
    graph_module: torch.fx.GraphModule
    direct_call: torch.fx.Node | None  # it is written in place of a function's call
    graph_of: dict[str, torch.fx.GraphModule] = field(default_factory=dict)
    holes_of: dict[str, tuple[Hole, ...]] = field(default_factory=dict)
    # literals that differ between them by their number, with the name of the parameter for it
    lifted: dict[int, str] = field(default_factory=dict)


@dataclass(slots=True)
class InlinePlan:
    """What became of each called submodule, callees first."""

    groups: dict[str, Inlined] = field(default_factory=dict)
    by_target: dict[str, Inlined] = field(default_factory=dict)

    @property
    def shared(self) -> list[Inlined]:
        """Functions to emit."""
        return [group for group in self.groups.values() if group.direct_call is None]


def plan_inlining(split_gm: torch.fx.GraphModule, submods: Collection[str] | None) -> InlinePlan:
    """Decide for every called GraphModule whether it is shared, written in place, or called."""
    plan = InlinePlan()
    calls: dict[str, list[torch.fx.Node]] = {}
    for path, gm in list(_inlinable(split_gm, submods, "", calls)):
        direct = _single_call(gm) if not any(map(_passes_container, calls[path])) else None
        structure = structure_of(gm, open_literals=direct is None)
        nested = any(node.op == "call_module" for node in gm.graph.nodes)
        # A body with submodules of its own refers to them by path, so it is not shared.
        key = f"{structure.key}:{path}" if nested or direct is not None else structure.key
        group = plan.groups.setdefault(key, Inlined(key, path, gm, direct))
        group.graph_of[path] = gm
        group.holes_of[path] = structure.holes
        plan.by_target[path] = group
    for group in plan.shared:
        _lift(group)
    return plan


def is_plain(callee: object) -> bool:
    """True if calling ``callee`` is running its graph, with a usual signature."""
    if not isinstance(callee, torch.fx.GraphModule) or "forward" in vars(callee):
        return False
    if callee._forward_hooks or callee._forward_pre_hooks:
        return False
    placeholders = callee.graph.find_nodes(op="placeholder")
    return (
        type(callee.graph._codegen) is CodeGen
        and len(callee.graph.find_nodes(op="output")) == 1
        and not any(str(node.target).startswith("*") for node in placeholders)
        # A default that is a container is one object for all calls; only the module itself keeps it.
        and all(is_inline_literal(default) for node in placeholders for default in node.args)
    )


def returned_value(graph: torch.fx.Graph) -> object:
    """What ``graph`` returns: nodes in any nesting; None without an output node."""
    outputs = graph.find_nodes(op="output")
    return outputs[0].args[0] if outputs else None


def bind_call(
    node: torch.fx.Node, callee: torch.fx.GraphModule
) -> list[tuple[torch.fx.Node, object]]:
    """What each placeholder of a plain ``callee`` stands for when ``node`` calls it."""
    placeholders = callee.graph.find_nodes(op="placeholder")
    values = dict(zip(placeholders, node.args, strict=False))
    named = {str(each.target): each for each in placeholders if each not in values}
    fits = len(node.args) <= len(placeholders) and node.kwargs.keys() <= named.keys()
    for name, placeholder in named.items():
        if name in node.kwargs:
            values[placeholder] = node.kwargs[name]
        elif placeholder.args:
            values[placeholder] = placeholder.args[0]
    if not fits or len(values) != len(placeholders):
        raise UnsupportedNode(
            f"{node.target!a} takes {len(placeholders)} arguments and is called with "
            f"{len(node.args)} positional ones and {sorted(node.kwargs)!a}",
            where=node_where(node),
        )
    return [(placeholder, values[placeholder]) for placeholder in placeholders]


def _passes_container(node: torch.fx.Node) -> bool:
    """A container that a call builds is one object."""
    containers = (*LIST_TYPES, *DICT_TYPES, tuple)
    return any(isinstance(value, containers) for value in (*node.args, *node.kwargs.values()))


def _inlinable(
    gm: torch.fx.GraphModule,
    submods: Collection[str] | None,
    prefix: str,
    calls: dict[str, list[torch.fx.Node]],
) -> Iterator[tuple[str, torch.fx.GraphModule]]:
    """Called GraphModules with their dotted paths, callees before callers, each once."""
    for node in gm.graph.find_nodes(op="call_module", sort=True):
        path = f"{prefix}.{node.target}" if prefix else str(node.target)
        if submods is not None and path in submods:
            continue
        try:
            callee = attribute_of(gm, str(node.target))
        except AttributeError:
            continue  # reported with the node when it is lowered
        if isinstance(callee, torch.fx.GraphModule) and is_plain(callee):
            calls.setdefault(path, []).append(node)
            if len(calls[path]) == 1:
                yield from _inlinable(callee, submods, path, calls)
                yield path, callee


def _single_call(gm: torch.fx.GraphModule) -> torch.fx.Node | None:
    """The only call of ``gm`` when its result, or nothing, is what ``gm`` returns."""
    calls = [n for n in gm.graph.nodes if n.op not in ("placeholder", "get_attr", "output")]
    if len(calls) != 1 or calls[0].op != "call_function":
        return None
    returned = returned_value(gm.graph)
    return calls[0] if returned is None or returned is calls[0] else None


def _lift(group: Inlined) -> None:
    """Find the literals in which members differ and make parameters of them."""
    nodes = list(group.graph_module.graph.nodes)
    for number, holes in enumerate(zip(*group.holes_of.values(), strict=True)):
        first = holes[0]
        if not all(same_literal(first.value, hole.value) for hole in holes):
            group.lifted[number] = _parameter_name(nodes[first.node], first.argument)


def _parameter_name(node: torch.fx.Node, argument: str) -> str:
    """The argument's name in the operator's schema, if it has one."""
    if is_identifier(argument):
        return argument
    arguments = getattr(getattr(node.target, "_schema", None), "arguments", ())
    if argument.isdigit() and int(argument) < len(arguments):
        return str(arguments[int(argument)].name)
    return "literal"
