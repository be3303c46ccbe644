"""Proof that emitted text does what its graph does. In: source text, or a `StitchedSource`, and the stitching graph. Out: a `Proof`, or an `EmitError`.

The text is traced by `trace_text`, which knows nothing of how it was made; the graph is walked here, and each of its nodes must
be the next event of the text: same callable, same operands in the same places, constants equal by type and bit. Nothing of the
text is executed but its imports, and nothing of the lowering is relied on.
"""

from __future__ import annotations

import ast
import operator
import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
import torch.fx

from piecework.codegen.origin import node_where, value_of
from piecework.codegen.structure import attribute_of
from piecework.codegen.trace import (
    Bound,
    Container,
    Escapes,
    Event,
    Input,
    Known,
    Value,
    picked,
)
from piecework.codegen.trace_text import EntryParameter, TextTrace, trace_text
from piecework.errors import EmitError


@dataclass(frozen=True, slots=True)
class Proof:
    """What was proved equal: the number of events (calls), and of statements that were run abstractly to get them."""

    events: int
    statements: int


def verify_text(
    code: str,
    split_gm: torch.fx.GraphModule,
    *,
    submod_names: Sequence[str],
    consts: Sequence[object],
    bound: Mapping[str, str] | None = None,
    bound_placeholders: Mapping[str, str] | None = None,
    direct: Mapping[object, object] | None = None,
    lifetimes: bool = True,
    tree: ast.Module | None = None,
) -> Proof:
    """Prove that ``code`` computes what ``split_gm`` computes, in the same order.

    Args:
        code: an emitted module, edited or not.
        split_gm: the stitching graph.
        submod_names: what ``__vllm_submods__`` holds, by name; those submodules are opaque, all others are looked into.
        consts: what ``__vllm_consts__`` holds.
        bound: name in the text → path of the weight that it holds.
        bound_placeholders: name of a placeholder → path of the weight that is held for it.
        direct: operator → the callable that the text may call in its place.
        lifetimes: also require that each value is deleted right after its last use.
        tree: ``code``, parsed.

    Raises:
        EmitError: the first difference, with the line of the text and the node of the graph.
    """
    if tree is None:
        try:
            tree = ast.parse(code)
        except (SyntaxError, ValueError) as error:
            raise EmitError(f"stitching source is not Python: {error}") from error
    text = trace_text(
        code,
        tree,
        submod_names=submod_names,
        consts=consts,
        bound=dict(bound or {}),
        lifetimes=lifetimes,
    )
    matcher = _Matcher(code, text, submod_names, direct or {})
    matcher.match(split_gm, dict(bound_placeholders or {}))
    return Proof(events=len(text.events), statements=text.statements)


class _Scope(NamedTuple):
    gm: torch.fx.GraphModule
    prefix: str
    values: dict[torch.fx.Node, Value]


class _Matcher:
    """Walks the graph and holds each node against the next event of the text."""

    def __init__(
        self,
        code: str,
        text: TextTrace,
        submod_names: Collection[str],
        direct: Mapping[object, object],
    ) -> None:
        self.code = code
        self.text = text
        self.submod_names = frozenset(submod_names)
        self.direct = direct
        self.next = 0
        self.escapes = Escapes()
        # For unpacked events: what is recorded of their results in the graph, and a node that uses one as a whole.
        self.recorded: dict[Event, list[Sequence[object]]] = {}
        self.whole: dict[Event, torch.fx.Node] = {}
        self.serial = 0
        # Containers of the graph and of the text that are the same object, both ways.
        self.text_serial: dict[int, int] = {}
        self.graph_serial: dict[int, int] = {}

    def match(self, split_gm: torch.fx.GraphModule, bound: Mapping[str, str]) -> None:
        scope = _Scope(split_gm, "", {})
        passed: list[torch.fx.Node] = []
        for node in split_gm.graph.find_nodes(op="placeholder"):
            if node.name in bound:
                scope.values[node] = Bound(bound[node.name])
            else:
                scope.values[node] = Input(len(passed))
                passed.append(node)
        self._match_signature(passed)
        returned, at = self._walk(scope)
        self._judge_unpacking()
        if self.next != len(self.text.events):
            extra = self.text.events[self.next]
            raise EmitError(
                "the text does something that the graph does not", where=self._line(extra)
            )
        if not self._same(returned, self.text.returned):
            raise EmitError(
                "the text returns something else than the graph",
                where=node_where(at) if at is not None else None,
            )

    def _match_signature(self, placeholders: Sequence[torch.fx.Node]) -> None:
        parameters = self.text.parameters
        for node, parameter in zip(placeholders, parameters, strict=False):
            if not self._fits(node, parameter):
                raise EmitError(
                    f"parameter {parameter.prefix}{parameter.name} differs in kind or default",
                    where=node_where(node),
                )
        if len(parameters) != len(placeholders):
            raise EmitError(
                f"the text takes {len(parameters)} inputs and the graph {len(placeholders)}"
            )

    def _fits(self, node: torch.fx.Node, parameter: EntryParameter) -> bool:
        target = str(node.target)
        stars = len(target) - len(target.lstrip("*"))
        if "*" * min(stars, 2) != parameter.prefix:
            return False
        if parameter.default is None or not node.args:
            return parameter.default is None and (not node.args or bool(stars))
        return self._same(self._converted(node.args[0], {}), parameter.default)

    # --- the graph -------------------------------------------------------------------------------

    def _walk(self, scope: _Scope) -> tuple[Value, torch.fx.Node | None]:
        values = scope.values
        for node in scope.gm.graph.nodes:
            op = node.op
            if op == "call_function":
                target = node.target
                element = self._picked(node, scope) if target is operator.getitem else None
                values[node] = element or self._event(node, "call", target, scope)
            elif op == "call_method":
                values[node] = self._event(node, "method", node.target, scope)
            elif op == "call_module":
                values[node] = self._call_module(node, scope)
            elif op == "get_attr":
                values[node] = Known(attribute_of(scope.gm, str(node.target)))
            elif op == "output":
                return self._converted(node.args[0], values), node
        return Known(None), None

    def _picked(self, node: torch.fx.Node, scope: _Scope) -> Value | None:
        """The element that ``node`` picks, if the text has it too without doing anything for it."""
        if len(node.args) != 2 or node.kwargs:
            return None
        source, index = node.args
        if not isinstance(source, (torch.fx.Node, tuple, list)):
            return None
        value = self._converted(source, scope.values)
        return None if self._is_picked_here(value, index) else self._element(value, index)

    def _is_picked_here(self, value: Value, index: object) -> bool:
        """True if the text picks this element now, although it is unpacked somewhere else: a result is handed on by the
        function that picks from it."""
        if type(value) is not Event or self.next >= len(self.text.events):
            return False
        event = self.text.events[self.next]
        return (
            event.target is operator.getitem
            and len(event.args) == 2
            and event.args[0] is value
            and type(event.args[1]) is Known
            and same_constant(index, event.args[1].value)
        )

    def _element(self, value: Value, index: object) -> Value | None:
        """What picking ``index`` yields, if the text has that element too without doing anything for it."""
        if type(value) is Event and value.parts is not None:
            inside = type(index) is int and 0 <= index < len(value.parts)
            return value.parts[cast(int, index)] if inside else None
        return picked(self.escapes.elements_of(value), index)

    def _call_module(self, node: torch.fx.Node, scope: _Scope) -> Value:
        path = f"{scope.prefix}.{node.target}" if scope.prefix else str(node.target)
        callee = attribute_of(scope.gm, str(node.target))
        if path in self.submod_names:
            return self._event(node, "submod", path, scope, callee)
        if not isinstance(callee, torch.fx.GraphModule):
            raise EmitError(
                f"module {path!a} is not among the names of __vllm_submods__",
                where=node_where(node),
            )
        placeholders = callee.graph.find_nodes(op="placeholder")
        inner = _Scope(callee, path, {})
        for placeholder, arg in zip(placeholders, node.args, strict=False):
            inner.values[placeholder] = self._converted(arg, scope.values)
        by_name = {str(placeholder.target): placeholder for placeholder in placeholders}
        for key, arg in node.kwargs.items():
            if key not in by_name or by_name[key] in inner.values:
                raise EmitError(f"{path!a} does not take {key!a}", where=node_where(node))
            inner.values[by_name[key]] = self._converted(arg, scope.values)
        for placeholder in placeholders:
            if placeholder not in inner.values and placeholder.args:
                inner.values[placeholder] = self._converted(placeholder.args[0], {})
        if len(inner.values) != len(placeholders) or len(node.args) > len(placeholders):
            raise EmitError(f"{path!a} is called with other arguments", where=node_where(node))
        value, _ = self._walk(inner)
        if type(value) is Event and value.parts is not None:
            self._note_unpacked(node, value, scope, callee)
        return value

    # --- one node against one event --------------------------------------------------------------

    def _event(
        self,
        node: torch.fx.Node,
        kind: str,
        target: object,
        scope: _Scope,
        callee: object = None,
    ) -> Value:
        if self.next >= len(self.text.events):
            raise EmitError("the text ends before this node", where=node_where(node))
        event = self.text.events[self.next]
        self.next += 1
        if event.target is not target and not self._same_target(kind, target, event.target):
            self._differ(node, event, f"a {kind} of something else")
        args, kwargs, values = node.args, node.kwargs, scope.values
        if event.kind != kind:
            self._differ(node, event, f"a {kind} of something else")
        if len(event.args) != len(args) or len(event.kwargs) != len(kwargs):
            self._differ(node, event, "another number of arguments")
        for place, (arg, theirs) in enumerate(zip(args, event.args, strict=True)):
            if not self._is(arg, theirs, values):
                self._differ(node, event, f"another argument {place}")
        if kwargs:
            for (key, arg), (name, theirs) in zip(kwargs.items(), event.kwargs, strict=True):
                if key != name or not self._is(arg, theirs, values):
                    self._differ(node, event, f"another argument {key!a}")
        if event.parts is not None:
            self._note_unpacked(node, event, scope, callee)
        return event

    def _note_unpacked(
        self, node: torch.fx.Node, event: Event, scope: _Scope, callee: object
    ) -> None:
        """Note how a result is used that the text unpacks, and what is recorded of it; a called graph may hand it on."""
        for user in node.users:
            args = user.args
            if user.op == "output" and args[0] is node and scope.prefix:
                continue
            index = args[1] if len(args) == 2 and not user.kwargs else None
            picks = user.target is operator.getitem and user.op == "call_function"
            if not picks or type(index) is not int or index < 0:
                self.whole.setdefault(event, node)
        for value in (value_of(node), _returned_by(callee)):
            if isinstance(value, (tuple, list)):
                self.recorded.setdefault(event, []).append(value)

    def _judge_unpacking(self) -> None:
        """Unpacking is picking elements early. That needs a known number of elements; and, unless it is a tuple, which
        nobody can change, that nothing but elements is ever used."""
        for event in self.text.events:
            if event.parts is None:
                continue
            recorded = self.recorded.get(event, [])
            if not recorded or any(len(value) != len(event.parts) for value in recorded):
                raise EmitError(
                    f"unpacks a result that is not known to have {len(event.parts)} elements",
                    where=self._line(event),
                )
            if event in self.whole and any(type(value) is not tuple for value in recorded):
                self._differ(
                    self.whole[event], event, "unpacks a result that the graph uses as a whole"
                )

    def _same_target(self, kind: str, ours: object, theirs: object) -> bool:
        if ours is theirs:
            return True
        if kind in ("method", "submod"):
            return type(ours) is str and type(theirs) is str and ours == theirs
        try:
            return ours in self.direct and self.direct[ours] is theirs
        except TypeError:  # not hashable, so it has no other implementation
            return False

    def _differ(self, node: torch.fx.Node, event: Event, what: str) -> None:
        raise EmitError(
            f"the text differs from the graph: {what}",
            where=f"{self._line(event)}; {node_where(node)}",
            hint="an edited file must still do what the graph does; a generated one that differs is a defect",
        )

    def _line(self, event: Event) -> str:
        lines = self.code.splitlines()
        text = lines[event.line - 1].strip() if event.line <= len(lines) else ""
        return f"line {event.line}: {text}"

    # --- values ----------------------------------------------------------------------------------

    def _converted(self, arg: object, values: Mapping[torch.fx.Node, Value]) -> Value:
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
        items = tuple([self._converted(part, values) for part in parts])
        self.serial += 1
        return Container(kind, items, self.serial)

    def _is(self, arg: object, theirs: Value, values: Mapping[torch.fx.Node, Value]) -> bool:
        """True if a node's argument is ``theirs``: what `_converted` makes of it would be the same, and was handed on."""
        kind: type = type(arg)
        if kind in _SCALARS:
            return type(theirs) is Known and same_constant(arg, theirs.value)
        if isinstance(arg, torch.fx.Node):
            if values.get(arg) is theirs:
                return True
            ours = self._converted(arg, values)
            self.escapes.note(ours)
            return self._same(ours, theirs)
        opened = _opened(arg)
        if opened is None:
            return type(theirs) is Known and same_constant(arg, theirs.value)
        kind, parts = opened
        if type(theirs) is not Container or theirs.kind is not kind:
            return False
        if len(parts) != len(theirs.items):
            return False
        self.serial += 1
        if not self._is_one_object(kind, self.serial, theirs.serial):
            return False
        for part, item in zip(parts, theirs.items, strict=True):
            if not self._is(part, item, values):
                return False
        return True

    def _same(self, ours: Value, theirs: Value) -> bool:
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
        return all(map(self._same, ours.items, other.items))

    def _is_one_object(self, kind: type, ours: int, theirs: int) -> bool:
        """A list or dict of the graph is always the same one of the text, and the other way round."""
        if kind is not list and kind is not dict:
            return True
        if self.text_serial.setdefault(ours, theirs) != theirs:
            return False
        return self.graph_serial.setdefault(theirs, ours) == ours


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
    if isinstance(arg, (tuple, list)) and hasattr(arg, "_fields") and _holds_node(arg):
        return kind, arg
    return None


def _returned_by(callee: object) -> object:
    """The container that a called graph returns, or what is recorded of the node that it returns."""
    if not isinstance(callee, torch.fx.GraphModule):
        return None
    outputs = callee.graph.find_nodes(op="output")
    returned = outputs[0].args[0] if outputs else None
    return value_of(returned) if isinstance(returned, torch.fx.Node) else returned


_SEQUENCES: dict[type, type] = {
    tuple: tuple,
    list: list,
    torch.fx.immutable_collections.immutable_list: list,
}
_SCALARS = frozenset({int, float, bool, str, type(None)})
_MAPPINGS = frozenset({dict, torch.fx.immutable_collections.immutable_dict})


def _holds_node(value: object) -> bool:
    if isinstance(value, torch.fx.Node):
        return True
    if isinstance(value, slice):
        return any(map(_holds_node, (value.start, value.stop, value.step)))
    if isinstance(value, dict):
        return any(map(_holds_node, value)) or any(map(_holds_node, value.values()))
    return isinstance(value, (tuple, list)) and any(map(_holds_node, value))


def same_constant(left: object, right: object) -> bool:
    """The same object, or two that nothing but identity can tell apart: equal type and bits."""
    if left is right:
        return True
    if isinstance(left, torch.fx.GraphModule) and isinstance(right, torch.fx.GraphModule):
        return same_program(left, right)
    if type(left) is not type(right):
        return False
    if isinstance(left, float) and isinstance(right, float):
        return left == left and struct.pack("d", left) == struct.pack("d", right)
    if isinstance(left, complex) and isinstance(right, complex):
        return same_constant(left.real, right.real) and same_constant(left.imag, right.imag)
    if type(left) in (int, bool, str, bytes, torch.device, torch.Size):
        return bool(left == right)
    return False


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
    matcher = _Matcher("", TextTrace(), (), {})
    left = matcher._converted([*one.args, *one.kwargs.values()], ours)
    right = matcher._converted([*two.args, *two.kwargs.values()], theirs)
    return matcher._same(left, right)
