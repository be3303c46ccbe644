"""Call mutating operators in place again. In: an aten graph with auto_functionalized nodes. Out: the graph with plain calls where that is safe.

A call stays as it was wherever the old value could still be seen.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.fx
from torch._ops import OpOverload

from piecework.codegen.graph.origin import value_of
from piecework.codegen.graph.schemas import writes_to
from piecework.runtime import torch_compat
from piecework.runtime.passes.interface import InductorPass
from piecework.runtime.passes.memory import Memory
from piecework.runtime.passes.nodes import storages_of

_aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class _View:
    """How a mutated argument is made: the number of its base, and an operator with its further arguments, if any."""

    base: int
    target: OpOverload | None = None
    args: tuple[object, ...] = ()


@dataclass(frozen=True, slots=True)
class _Call:
    """What a functionalised node stands for.

    Attributes:
        op: the mutating operator.
        arguments: those that are only read, by name.
        written: argument name → a view, a list of views, or None where none was given.
        bases: the mutated tensors, in the order in which the node returns them after the operator's own results.
    """

    op: OpOverload
    arguments: Mapping[str, object]
    written: Mapping[str, _View | list[_View | None] | None]
    bases: tuple[object, ...]


class DefunctionalizationPass(InductorPass):
    """Turns ``auto_functionalized(op, …)`` back into ``op(…)`` on the tensors themselves.

    Which arguments are written is read from the operator's schema, so it holds for every operator. The call may write
    in place if nothing reads the old content afterwards (through any view), the memory belongs to the graph or is
    written back to its input anyway, and no other argument lies in the same memory.
    """

    def __call__(self, graph: torch.fx.Graph) -> int:
        found = [
            node
            for node in graph.nodes
            if node.op == "call_function" and node.target in torch_compat.auto_functionalized_ops()
        ]
        memory = Memory(graph) if found else None
        matches = 0
        for node in found:
            call = _read(node.args[0] if node.args else None, node.kwargs)
            if call is not None and memory is not None and _is_safe(node, call, memory):
                _call_in_place(node, call, graph, memory)
                matches += 1
        return matches


# --- what a node means -------------------------------------------------------------------------------


def _read(op: object, given: Mapping[str, object]) -> _Call | None:
    """The call that a functionalised node stands for; None for forms that are left to Inductor.

    Args:
        op: the first argument of the node.
        given: its keyword arguments, as nodes or as values.
    """
    if not isinstance(op, OpOverload):
        return None
    names = [each.name for each in op._schema.arguments if writes_to(each)]
    if "_all_bases" not in given:
        return _read_first_form(op, names, given)
    rest = dict(given)
    bases = rest.pop("_all_bases")
    assert isinstance(bases, (list, tuple))
    written: dict[str, _View | list[_View | None] | None] = {}
    try:
        for name in names:
            if f"_{name}_length" in rest:
                length = rest.pop(f"_{name}_length")
                written[name] = (
                    [_take_view(rest, f"_{name}_{i}") for i in range(length)]
                    if isinstance(length, int)
                    else None
                )
            else:
                written[name] = _take_view(rest, f"_{name}")
    except KeyError:
        return None  # an out operator, or a form that this version of torch added
    if not rest.keys() <= {each.name for each in op._schema.arguments}:
        return None
    return _Call(op, rest, written, tuple(bases))


def _read_first_form(op: OpOverload, names: list[str], given: Mapping[str, object]) -> _Call | None:
    """The older form: the mutated tensors are keyword arguments of their own names."""
    bases = tuple(given.get(name) for name in names)
    if any(each is None or isinstance(each, (list, tuple)) for each in bases):
        return None  # its results have gaps, or lists among them
    arguments = {key: value for key, value in given.items() if key not in names}
    return _Call(op, arguments, {name: _View(i) for i, name in enumerate(names)}, bases)


def _take_view(rest: dict[str, object], prefix: str) -> _View | None:
    """Take the description of one mutated tensor out of ``rest``."""
    base = rest.pop(f"{prefix}_base_index")
    if not isinstance(base, int):
        return None
    if rest.pop(f"{prefix}_alias", False):
        return _View(base, _aten.alias.default)
    if f"{prefix}_slice_dim" in rest:
        args = tuple(rest.pop(f"{prefix}_slice_{part}") for part in ("dim", "start", "end"))
        return _View(base, _aten.slice.Tensor, args)
    if f"{prefix}_storage_offset" in rest:
        args = tuple(rest.pop(f"{prefix}_{part}") for part in ("size", "stride", "storage_offset"))
        return _View(base, _aten.as_strided.default, args)
    return _View(base)


# --- whether it may write in place -------------------------------------------------------------------


def _is_safe(node: torch.fx.Node, call: _Call, memory: Memory) -> bool:
    if not all(u.target is operator.getitem and type(u.args[1]) is int for u in node.users):
        return False
    readers: list[torch.fx.Node] = []
    torch.fx.map_arg(dict(call.arguments), readers.append)
    read = frozenset().union(*map(memory.of, readers))
    taken: set[int] = set()
    for index, base in enumerate(call.bases):
        own = memory.of(base) if isinstance(base, torch.fx.Node) else frozenset()
        if len(own) != 1 or storages_of(base) is None or own & taken or own & read:
            return False
        taken |= own
        result = _result_at(node, call, index)
        (storage,) = own
        holders = memory.nodes_in(storage)
        if not _is_ours(base, holders, result):
            return False
        if _is_read_later(node, holders, memory.order, result):
            return False
    return True


def _is_ours(
    base: torch.fx.Node, holders: list[torch.fx.Node], result: list[torch.fx.Node]
) -> bool:
    """Whether the memory may be overwritten: the graph allocated it, or the result is copied back to the input."""
    outside = [each for each in holders if each.op in ("placeholder", "get_attr")]
    if not outside:
        return True
    if outside != [base] or base.op != "placeholder":
        return False
    return any(_is_copy_back(user, base) for each in result for user in each.users)


def _is_copy_back(user: torch.fx.Node, base: torch.fx.Node) -> bool:
    return user.target is _aten.copy_.default and user.args[0] is base and len(user.users) == 0


def _is_read_later(
    node: torch.fx.Node,
    holders: list[torch.fx.Node],
    order: Mapping[torch.fx.Node, int],
    result: list[torch.fx.Node],
) -> bool:
    """Whether a node after ``node`` reads the old content through one of ``holders``."""
    for each in holders:
        for user in each.users:
            written_back = _is_copy_back(user, each) and user.args[1] in result
            if order[user] > order[node] and not written_back:
                return True
    return False


def _result_at(node: torch.fx.Node, call: _Call, index: int) -> list[torch.fx.Node]:
    """The nodes that pick the new value of mutated tensor number ``index``."""
    place = _own_results(call.op) + index
    return [
        user for user in node.users if user.target is operator.getitem and user.args[1] == place
    ]


def _own_results(op: OpOverload) -> int:
    """How many entries of the functional result are the operator's own; an operator without a result gives None."""
    return max(1, len(op._schema.returns))


# --- the rewrite -------------------------------------------------------------------------------------


def _call_in_place(node: torch.fx.Node, call: _Call, graph: torch.fx.Graph, memory: Memory) -> None:
    before = node.prev
    with graph.inserting_before(node):
        written = {name: _insert_view(view, call, graph) for name, view in call.written.items()}
        new = graph.call_function(call.op, *_arranged(call.op, {**call.arguments, **written}))
    _set_meta(new, node, call.op)
    made = before.next
    while made is not node:
        memory.order[made] = memory.order[node]
        memory.add(made)
        made = made.next
    for index, base in enumerate(call.bases):
        for each in _result_at(node, call, index):
            memory.merge(memory.of(base), memory.of(each))
    _replace_results(node, new, call, graph)
    graph.erase_node(node)


def _arranged(
    op: OpOverload, given: Mapping[str, object]
) -> tuple[tuple[object, ...], dict[str, object]]:
    """Arguments by position as far as the schema allows, the rest by name."""
    args: list[object] = []
    kwargs: dict[str, object] = {}
    for place, each in enumerate(op._schema.arguments):
        if each.name not in given:
            continue
        if each.kwarg_only or place != len(args):
            kwargs[each.name] = given[each.name]
        else:
            args.append(given[each.name])
    return tuple(args), kwargs


def _insert_view(
    view: _View | list[_View | None] | None, call: _Call, graph: torch.fx.Graph
) -> object:
    """A node for a mutated argument, made of its base."""
    if isinstance(view, list):
        return [_insert_view(each, call, graph) for each in view]
    if view is None or view.target is None:
        return None if view is None else call.bases[view.base]
    made = graph.call_function(view.target, (call.bases[view.base], *view.args))
    values = torch.fx.map_arg(made.args, value_of)
    made.meta["val"] = _fake_view(view.target, values)
    return made


def _fake_view(target: OpOverload, values: tuple[object, ...]) -> object:
    """The fake value of a view; a fake tensor brings the mode that it is computed in."""
    mode = getattr(values[0], "fake_mode", None)
    with contextlib.nullcontext() if mode is None else mode:
        return target(*values)


def _set_meta(new: torch.fx.Node, old: torch.fx.Node, op: OpOverload) -> None:
    """Everything recorded of the old node, in terms of the new one."""
    known = ("val", "example_value", "eager_input_vals")
    new.meta.update({key: value for key, value in old.meta.items() if key not in known})
    value = value_of(old)
    if isinstance(value, (tuple, list)):
        count = len(op._schema.returns)
        own = tuple(value[:count])
        new.meta["val"] = own if count > 1 else own[0] if count == 1 else None
    if "eager_input_vals" in old.meta:
        # The layouts that the operator saw when it was traced; Inductor keeps to them.
        eager = _read(op, old.meta["eager_input_vals"][1])
        if eager is not None:
            written = {n: _eager_view(view, eager) for n, view in eager.written.items()}
            new.meta["eager_input_vals"] = _arranged(op, {**eager.arguments, **written})


def _eager_view(view: _View | list[_View | None] | None, eager: _Call) -> object:
    if isinstance(view, list):
        return [_eager_view(each, eager) for each in view]
    if view is None or view.target is None:
        return None if view is None else eager.bases[view.base]
    return _fake_view(view.target, (eager.bases[view.base], *view.args))


def _replace_results(
    node: torch.fx.Node, new: torch.fx.Node, call: _Call, graph: torch.fx.Graph
) -> None:
    count = _own_results(call.op)
    for user in list(node.users):
        place = user.args[1]
        assert isinstance(place, int)
        if place >= count:
            base = call.bases[place - count]
            for reader in list(user.users):
                if _is_copy_back(reader, base):
                    graph.erase_node(reader)
            user.replace_all_uses_with(base)
            graph.erase_node(user)
        elif len(call.op._schema.returns) > 1:
            user.replace_input_with(node, new)
        else:
            user.replace_all_uses_with(new)
            graph.erase_node(user)
