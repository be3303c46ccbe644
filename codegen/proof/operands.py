"""When an operand of a graph is an operand of a text. In: arguments of FX nodes, and values of a text's trace. Out: whether they are the same.

Constants are the same if nothing but identity can tell them apart; lists and dicts also stand for themselves as objects. Nothing is run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
import torch.fx

from piecework.codegen.graph.consts import holds_node
from piecework.codegen.graph.origin import node_where
from piecework.codegen.graph.structure import attribute_of
from piecework.codegen.plan.literals import same_literal
from piecework.codegen.proof.trace import Bound, Container, Escapes, Input, Known, Value
from piecework.errors import EmitError

_SEQUENCES: dict[type, type] = {
    tuple: tuple,
    list: list,
    torch.fx.immutable_collections.immutable_list: list,
}
_SCALARS = frozenset({int, float, bool, str, type(None)})
_MAPPINGS = frozenset({dict, torch.fx.immutable_collections.immutable_dict})


class Operands:
    """Compares operands, and remembers which containers of the graph and of the text are one object, and which were handed on."""

    def __init__(self) -> None:
        self.escapes = Escapes()
        self._serial = 0
        self._text_serial: dict[int, int] = {}
        self._graph_serial: dict[int, int] = {}

    def value(self, arg: object, values: Mapping[torch.fx.Node, Value]) -> Value:
        """A node's argument as a value; every container in it is a new object."""
        if isinstance(arg, torch.fx.Node):
            found = values.get(arg)
            if found is None:
                raise EmitError("a node is used before it is defined", where=node_where(arg))
            return found
        opened = _opened(arg)
        if opened is None:
            return Known(arg)
        kind, parts = opened
        items = tuple([self.value(part, values) for part in parts])
        self._serial += 1
        return Container(kind, items, self._serial)

    def is_same(self, arg: object, theirs: Value, values: Mapping[torch.fx.Node, Value]) -> bool:
        """True if a node's argument is ``theirs``: what `value` makes of it would be the same, and was handed on."""
        kind: type = type(arg)
        if kind in _SCALARS:
            return type(theirs) is Known and same_constant(arg, theirs.value)
        if isinstance(arg, torch.fx.Node):
            if values.get(arg) is theirs:
                return True
            ours = self.value(arg, values)
            self.escapes.note(ours)
            return self.same(ours, theirs)
        opened = _opened(arg)
        if opened is None:
            return type(theirs) is Known and same_constant(arg, theirs.value)
        kind, parts = opened
        if type(theirs) is not Container or theirs.kind is not kind:
            return False
        if len(parts) != len(theirs.items):
            return False
        self._serial += 1
        if not self._is_one_object(kind, self._serial, theirs.serial):
            return False
        for part, item in zip(parts, theirs.items, strict=True):
            if not self.is_same(part, item, values):
                return False
        return True

    def same(self, ours: Value, theirs: Value) -> bool:
        """True if a value of the graph is one of the text."""
        if type(ours) is not type(theirs):
            return False
        if isinstance(ours, Known):
            return same_constant(ours.value, cast(Known, theirs).value)
        if not isinstance(ours, Container):
            return ours is theirs or (isinstance(ours, (Input, Bound)) and ours == theirs)
        other = cast(Container, theirs)
        if ours.kind is not other.kind or len(ours.items) != len(other.items):
            return False
        if not self._is_one_object(ours.kind, ours.serial, other.serial):
            return False
        return all(map(self.same, ours.items, other.items))

    def _is_one_object(self, kind: type, ours: int, theirs: int) -> bool:
        """A list or dict of the graph is always the same one of the text, and the other way round."""
        if kind is not list and kind is not dict:
            return True
        if self._text_serial.setdefault(ours, theirs) != theirs:
            return False
        return self._graph_serial.setdefault(theirs, ours) == ours


def _opened(arg: object) -> tuple[type, Sequence[object]] | None:
    """The kind and the parts of an argument that the text builds anew; None for a constant."""
    kind: type = type(arg)
    if kind in _SEQUENCES:
        return _SEQUENCES[kind], cast(Sequence[object], arg)
    if kind is slice:
        cut = cast(slice, arg)
        return slice, (cut.start, cut.stop, cut.step)
    if kind in _MAPPINGS:
        return dict, [each for pair in cast(dict[object, object], arg).items() for each in pair]
    if isinstance(arg, (tuple, list)) and hasattr(arg, "_fields") and holds_node(arg):
        return kind, arg
    return None


def same_constant(left: object, right: object) -> bool:
    """The same object, or two that nothing but identity can tell apart: equal type and bits."""
    if left is right:
        return True
    if isinstance(left, torch.fx.GraphModule) and isinstance(right, torch.fx.GraphModule):
        return same_program(left, right)
    if type(left) is not type(right):
        return False
    if type(left) in (torch.device, torch.Size):
        return bool(left == right)
    return bool(same_literal(left, right))


def same_program(left: torch.fx.GraphModule, right: torch.fx.GraphModule) -> bool:
    """Two graphs, node by node: the same operations on the same operands, equal constants, the very same tensors."""
    ours, theirs = list(left.graph.nodes), list(right.graph.nodes)
    plain = not (left._forward_hooks or left._forward_pre_hooks or left.training != right.training)
    plain = plain and not (right._forward_hooks or right._forward_pre_hooks)
    if not plain or len(ours) != len(theirs):
        return False
    number = {node: Input(index) for index, node in enumerate(ours)}
    values = {node: Input(index) for index, node in enumerate(theirs)}
    for one, two in zip(ours, theirs, strict=True):
        if one.op != two.op or list(one.kwargs) != list(two.kwargs):
            return False
        if one.op in ("get_attr", "call_module"):
            first = attribute_of(left, str(one.target))
            if not same_constant(first, attribute_of(right, str(two.target))):
                return False
        elif one.op == "placeholder":
            if str(one.target).startswith("*") or str(two.target).startswith("*"):
                return False
        elif one.op == "call_method":
            if one.target != two.target:
                return False
        elif one.op == "call_function" and one.target is not two.target:
            return False
        if not _same_arguments(one, number, two, values):
            return False
    return True


def _same_arguments(
    one: torch.fx.Node,
    ours: Mapping[torch.fx.Node, Value],
    two: torch.fx.Node,
    theirs: Mapping[torch.fx.Node, Value],
) -> bool:
    operands = Operands()
    left = operands.value([*one.args, *one.kwargs.values()], ours)
    right = operands.value([*two.args, *two.kwargs.values()], theirs)
    return operands.same(left, right)
