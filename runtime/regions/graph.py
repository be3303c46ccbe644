"""The graph of a marked trace, written out flat. In: a graph with the marks of one trace. Out: the graph of a trace without marks: the nodes of each first layer again for each other one.

A copy has the weights, the place in the model and the literals of its own layer, and fake values of its own. The graph is as a flat
trace would have it but for the numbers at the end of its nodes' names; where it might not be, it is refused.
"""

from __future__ import annotations

import operator
import os
import re
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx
from torch.fx.node import base_types
from torch.utils import _pytree as pytree

from piecework.runtime import splitting_op, torch_compat
from piecework.runtime.bind.facts import same
from piecework.runtime.regions.alike import Alike
from piecework.runtime.regions.facts import LayerPlaces, Read
from piecework.runtime.regions.found import Group
from piecework.runtime.regions.literals import Origin, Slot
from piecework.runtime.regions.marks import FILE, Mark, Marks, Refused, kinds_of, same_kinds

_FRAME = re.compile(r'  File "([^"\n]+)", line \d+, in [^\n]*\n(?:    [^\n]*\n?)*')
_LINE = re.compile(r'^\s*File "([^"\n]+)", line (\d+), in ', re.MULTILINE)
_CALLS = (os.path.dirname(torch.__file__) + os.sep, splitting_op.__file__)
_MARKED = ".forward.__self__"


@dataclass(eq=False, slots=True)
class _Template:
    """The nodes of a group's first layer."""

    group: Group
    enter: torch.fx.Node
    leave: torch.fx.Node
    nodes: list[torch.fx.Node]


@dataclass(slots=True)
class FlatGraph:
    """Writes a marked graph out.

    Args:
        gm: the graph, changed in place.
        inputs: the example inputs, one per placeholder.
        marks: what its marks are.
        places: where the trace found the layers.

    Attributes:
        inputs: now with those of the layers that were not traced.
        called: the layers that a first one stands for, by identity.
    """

    gm: torch.fx.GraphModule
    inputs: list[object]
    marks: Marks
    places: LayerPlaces
    called: set[int] = field(default_factory=set)
    _calls: list[tuple[torch.fx.Node, Mark, _Template]] = field(default_factory=list)
    _by_tensor: dict[int, torch.fx.Node] = field(default_factory=dict)
    _tensor_of: dict[torch.fx.Node, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        placeholders = self.gm.graph.find_nodes(op="placeholder")
        for node, value in zip(placeholders, self.inputs, strict=True):
            self._tensor_of[node] = value
            if isinstance(value, torch.Tensor):
                self._by_tensor.setdefault(id(value), node)
        self._find()

    @property
    def calls(self) -> list[Mark]:
        """The calls of layers that were not traced."""
        return [mark for _, mark, _ in self._calls]

    def _find(self) -> None:
        """Find the marks in the graph; a call stands beside the last one of its group's first layer, which it was compared with."""
        last: dict[int, _Template] = {}
        open_: dict[int, tuple[torch.fx.Node, list[torch.fx.Node]]] = {}
        for node in self.gm.graph.nodes:
            mark = self._mark_of(node)
            if mark is None:
                for _, nodes in open_.values():
                    nodes.append(node)
            elif mark.kind == "enter":
                open_[id(mark.group)] = node, []
            elif mark.kind == "leave":
                enter, nodes = open_.pop(id(mark.group))
                last[id(mark.group)] = _Template(mark.group, enter, node, nodes)
            else:
                if open_:
                    raise Refused("a layer is called inside of another")
                if id(mark.group) not in last:
                    raise Refused("a layer is called whose kind was not traced")
                self._calls.append((node, mark, last[id(mark.group)]))
                self.called.add(id(mark.alike.second))  # type: ignore[union-attr]
        if open_:
            raise Refused("a layer is called inside of itself")

    def _mark_of(self, node: torch.fx.Node) -> Mark | None:
        if node.op != "call_function" or not isinstance(node.target, types.FunctionType):
            return None
        return self.marks.by_function.get(node.target)

    def write_out(
        self, slots: Mapping[Slot, Origin], reads: Callable[[Group, Alike], Sequence[Read]]
    ) -> None:
        """Replace each call by the nodes of its layer, and take the marks out.

        Args:
            slots: arguments of operators that attributes of layers go to.
            reads: what the trace read of a group's first layer, and another one has otherwise.

        Raises:
            Refused: a graph can't be shown to be the one that a flat trace would have.
        """
        for template in {id(each): each for _, _, each in self._calls}.values():
            self._require_plain(template)
        for node in self.gm.graph.nodes:
            _without_mark(node)
        cursor = _Cursor(self.gm.graph)
        calls = {node: (mark, template) for node, mark, template in self._calls}
        for node in list(self.gm.graph.nodes):
            if node.op == "placeholder":
                continue
            if node not in calls:
                cursor.after(node)
            else:
                mark, own = calls[node]
                assert mark.alike is not None
                found = list(reads(mark.group, mark.alike))
                try:
                    _Copy(self, own, node, mark.alike, cursor, slots, found).make()
                except RuntimeError as error:  # of an operator on fake values
                    raise Refused(f"its fake values can't be made: {error}") from error
        for node in list(self.gm.graph.nodes):
            if self._mark_of(node) is not None:
                given = node.all_input_nodes
                self.gm.graph.erase_node(node)
                self._erase_unread(given)
        by_node = self._tensor_of
        self.inputs = [by_node[node] for node in self.gm.graph.find_nodes(op="placeholder")]
        self.gm.recompile()

    def _erase_unread(self, given: Sequence[torch.fx.Node]) -> None:
        """Take inputs out that only marks read."""
        for node in given:
            value = node.meta.get("example_value")
            if node.op == "placeholder" and not node.users and isinstance(value, torch.Tensor):
                self.gm.graph.erase_node(node)

    def _require_plain(self, template: _Template) -> None:
        """Raise if the nodes of a layer depend on more than its inputs and weights, or hold what can't be looked into."""
        inside = set(template.nodes)
        given = set(template.enter.all_input_nodes)
        returned = set(template.leave.all_input_nodes)
        for node in template.nodes:
            if node.op not in ("call_function", "call_method"):
                raise Refused(f"its graph has a {node.op}")
            if node.meta.get("unbacked_bindings"):
                raise Refused("its graph has a size that depends on data")
            for each in node.all_input_nodes:
                known = each in inside or each in given or each.op == "placeholder"
                if not (known or _is_number(each)):
                    raise Refused(f"it reads {each.name}, which is no argument of it")
            pytree.tree_map_(_require_literal, (node.args, dict(node.kwargs)))
            users = [
                user for user in node.users if user not in inside and user is not template.leave
            ]
            if users and node not in returned and not _is_number(node):
                raise Refused(f"{node.name} of its graph is used outside, and not returned")

    def has_attributes(self, node: object) -> bool:
        """Whether a node is an input, a tensor that has Python attributes."""
        value = self._tensor_of.get(node)  # type: ignore[call-overload]
        names = value.__dict__ if isinstance(value, torch.Tensor) else ()
        return any(not ("_dynamo_" in name or name == "_specialize_on") for name in names)

    def stands_for(self, old: torch.fx.Node, new: object, alike: Alike) -> bool:
        """Whether a layer is given what the first one is given, as far as layers hold it: of its own what is the first one's own there."""
        one, other = self._tensor_of.get(old), self._tensor_of.get(new)  # type: ignore[call-overload]
        owned = self.places.owned()
        if owned.get(id(one)) is None and owned.get(id(other)) is None:
            return True
        return id(one) in alike.pairs and alike.counterpart(one) is other

    def placeholder(
        self, old: torch.fx.Node, alike: Alike, cursor: _Cursor, mode: Any
    ) -> torch.fx.Node:
        """The graph's input that another layer has where the first has ``old``."""
        tensor = self._tensor_of[old]
        if not isinstance(tensor, torch.Tensor):
            return old
        own = alike.counterpart(tensor)
        if own is tensor:
            return old
        known = self._by_tensor.get(id(own))
        if known is not None:
            cursor.after(known)
            return known
        source = torch_compat.placeholder_source(old)
        path = self.places.moved_name_of(alike, source)
        with self.gm.graph.inserting_after(cursor.node):
            made = self.gm.graph.placeholder(re.sub(r"\W", "_", path))
        made.meta = {key: value for key, value in old.meta.items() if key in _KEPT}
        made.meta["grapharg"] = types.SimpleNamespace(source=types.SimpleNamespace(name=path))
        made.meta["example_value"] = mode.from_tensor(own, static_shapes=True)
        self._by_tensor[id(own)] = made
        self._tensor_of[made] = own
        cursor.added(made)
        return made


_KEPT = ("stack_trace", "nn_module_stack", "tensor_dict")


class _Cursor:
    """The last placeholder that the nodes up to some point read: where the next layer's belong."""

    def __init__(self, graph: torch.fx.Graph) -> None:
        self.node = next(iter(graph.find_nodes(op="placeholder")), None)

    def after(self, node: torch.fx.Node) -> None:
        for each in (node, *node.all_input_nodes):
            if each.op == "placeholder" and (self.node is None or each > self.node):
                self.node = each

    def added(self, node: torch.fx.Node) -> None:
        self.node = node


@dataclass(slots=True)
class _Copy:
    """One layer's nodes, made from those of the first of its group."""

    flat: FlatGraph
    template: _Template
    call: torch.fx.Node
    alike: Alike
    cursor: _Cursor
    slots: Mapping[Slot, Origin]
    reads: Sequence[Read]
    _env: dict[torch.fx.Node, Any] = field(default_factory=dict)
    _results: dict[torch.fx.Node, Any] = field(default_factory=dict)

    def make(self) -> None:
        template, call = self.template, self.call
        for node in (template.enter, call):
            if not _is_called(node, type(self.alike.first)):
                raise Refused("its forward is called past the call of its module")
        self._match(
            (template.enter.args, dict(template.enter.kwargs)), (call.args, dict(call.kwargs))
        )
        values = [_value(each) for each in call.all_input_nodes]
        mode = torch_compat.fake_mode_of([*values, *pytree.tree_leaves(_value(call))])
        memory = torch_compat.MemoryLike()
        own = set(template.nodes)
        for node in template.nodes:
            for each in node.all_input_nodes:
                if _is_number(each) and each not in own:
                    self._env.setdefault(each, each)
                if each.op == "placeholder" and each not in self._env:
                    made = self.flat.placeholder(each, self.alike, self.cursor, mode)
                    self._env[each] = made
                    if made is not each:
                        self._rename(made, each)
        for old, new in self._env.items():
            if not memory.is_like(old.meta["example_value"], _value(new)):
                raise Refused("its inputs share memory otherwise than those of the first layer")
        results = template.leave.args[0]
        self._remember(memory, results, _value(call))
        with mode, torch.no_grad(), torch_compat.no_new_guards(mode):
            for node in template.nodes:
                self._copy(node, memory)
        self._replace(call, pytree.tree_map_only(torch.fx.Node, self._env.__getitem__, results))
        self.flat.gm.graph.erase_node(call)

    def _match(self, first: object, own: object) -> None:
        """Note which of the call's values stands for which of the first layer's."""
        leaves = [pytree.tree_leaves(each, is_leaf=lambda x: x is None) for each in (first, own)]
        for old, new in zip(*leaves, strict=True):
            if isinstance(old, torch.fx.Node):
                if self._env.setdefault(old, new) is not new:
                    raise Refused("two of its arguments are one for the first layer")
                if new is not old and (
                    self.flat.has_attributes(old) or self.flat.has_attributes(new)
                ):
                    raise Refused("an argument of it is a tensor that has attributes")
                if not self.flat.stands_for(old, new, self.alike):
                    raise Refused("it is given a tensor that a layer holds")
            elif not same(old, new):
                raise Refused(f"it is given {new!r} where the first layer is given {old!r}")

    def _remember(self, memory: torch_compat.MemoryLike, nodes: Any, values: Any) -> None:
        """The results have the fake values that the trace went on with."""
        if isinstance(nodes, torch.fx.Node):
            if not memory.is_like(_value(nodes), values):
                raise Refused("its results share memory otherwise than those of the first layer")
            self._results[nodes] = values
        elif isinstance(nodes, (tuple, list)):
            for node, value in zip(nodes, values, strict=True):
                self._remember(memory, node, value)

    def _copy(self, node: torch.fx.Node, memory: torch_compat.MemoryLike) -> None:
        if _is_number(node) and all(self._env[each] is each for each in node.all_input_nodes):
            self._env[node] = node  # Dynamo computes a number once
            return
        with self.flat.gm.graph.inserting_before(self.call):
            made = self.flat.gm.graph.node_copy(node, self._env.__getitem__)
        made.meta = dict(node.meta)
        self._env[node] = made
        self._rename(made, node)
        if "example_value" in node.meta:
            old = node.meta["example_value"]
            if node in self._results:
                made.meta["example_value"] = self._results[node]
            elif isinstance(old, torch.Tensor):
                made.meta["example_value"] = memory.tensor(old)
            else:
                made.meta["example_value"] = pytree.tree_map_only(torch.Tensor, memory.tensor, old)
        self._literals(made)

    def _literals(self, node: torch.fx.Node) -> None:
        """Give operators the layer's own name or index."""
        op = node.target if isinstance(node.target, torch._ops.OpOverload) else None
        if isinstance(node.target, torch._ops.OpOverloadPacket):
            op = node.target.default
        if op is None or not self.slots:
            return
        changed = False
        args, kwargs = list(node.args), dict(node.kwargs)
        for place, value in (*enumerate(args), *kwargs.items()):
            argument = op._schema.arguments[place].name if isinstance(place, int) else place
            origin = self.slots.get((op._schema.name, argument))
            name = None if origin is None else origin.name
            found = [each for each in self.reads if each.name == name and same(each.first, value)]
            if origin is None or not found:
                continue
            if not origin.made_at(*_line_of(node)):
                raise Refused(
                    f"argument {argument} of {op} has several origins", frozenset({origin.name})
                )
            if not all(same(each.second, found[0].second) for each in found):
                raise Refused(
                    f"attributes {origin.name} differ in more than one way",
                    frozenset({origin.name}),
                )
            changed = True
            if isinstance(place, int):
                args[place] = found[0].second
            else:
                kwargs[place] = found[0].second  # type: ignore[assignment, index]
        if changed:
            node.args, node.kwargs = tuple(args), kwargs
            self._require_same_kind(node, op)

    def _require_same_kind(self, node: torch.fx.Node, op: torch._ops.OpOverload) -> None:
        """Raise if the literal changes what the operator returns."""
        if not op._schema.returns:
            return
        args, kwargs = pytree.tree_map_only(torch.fx.Node, _value, (node.args, dict(node.kwargs)))
        if not same_kinds(kinds_of(op(*args, **kwargs)), kinds_of(node.meta["example_value"])):
            raise Refused(f"what {op} returns depends on a layer's name or number")

    def _rename(self, made: torch.fx.Node, old: torch.fx.Node) -> None:
        """Say of a node that it is this layer's."""
        stack = old.meta.get("nn_module_stack")
        own, first = (
            each.meta.get("nn_module_stack") or {} for each in (self.call, self.template.enter)
        )
        if not stack or not own or not first:
            return
        (key, (path, _)), (own_key, (own_path, _)) = list(first.items())[-1], list(own.items())[-1]
        moved: dict[str, object] = dict(own) if key in stack else {}
        for each, (where, kind) in stack.items():
            if each in first:
                continue
            if where.startswith(path):
                where = own_path + where[len(path) :]
            moved[each.replace(key, own_key)] = where, kind
        made.meta["nn_module_stack"] = moved

    def _replace(self, node: torch.fx.Node, results: Any) -> None:
        """Let what used a call, or an item of it, use what the layer's nodes made."""
        if isinstance(results, torch.fx.Node):
            node.replace_all_uses_with(results)
            return
        for user in list(node.users):
            if user.target is not operator.getitem or user.args[0] is not node:
                raise Refused(f"{user.name} takes its results in a way of its own")
            self._replace(user, results[user.args[1]])
            self.flat.gm.graph.erase_node(user)


def _is_number(node: torch.fx.Node) -> bool:
    """Whether it computes a size from sizes."""
    return (
        node.op == "call_function"
        and isinstance(_value(node), torch.SymInt)
        and all(isinstance(_value(each), torch.SymInt) for each in node.all_input_nodes)
    )


def _value(node: object) -> Any:
    return node.meta.get("example_value") if isinstance(node, torch.fx.Node) else node


def _is_called(node: torch.fx.Node, kind: type) -> bool:
    """Whether a mark stands in a call of a module of this class, so that what the layer computes is known to be its."""
    stack = [where for _, where in (node.meta.get("nn_module_stack") or {}).values()]
    return bool(stack) and stack[-1] in (kind, f"{kind.__module__}.{kind.__qualname__}")


def _line_of(node: torch.fx.Node) -> tuple[str, int]:
    """The user's line that called an operator."""
    found = _LINE.findall(str(node.meta.get("stack_trace")))
    users = [(file, int(line)) for file, line in found if not file.startswith(_CALLS)]
    return users[-1] if users else ("", 0)


def _require_literal(value: object) -> None:
    known = (*base_types, torch.fx.Node, type(None), type(...))
    if isinstance(value, slice):
        for each in (value.start, value.stop, value.step):
            _require_literal(each)
    elif not isinstance(value, known):
        raise Refused(f"its graph holds a {type(value).__qualname__}")


def _without_mark(node: torch.fx.Node) -> None:
    """Let a node look as if its layer had not been marked."""
    trace = node.meta.get("stack_trace")
    if isinstance(trace, str):
        node.meta["stack_trace"] = _FRAME.sub(
            lambda found: "" if found[1] == FILE else found[0], trace
        )
    stack = node.meta.get("nn_module_stack")
    if stack:
        node.meta["nn_module_stack"] = {
            key: (path.replace(_MARKED, ""), kind) for key, (path, kind) in stack.items()
        }
