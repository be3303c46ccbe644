"""Proof that emitted text does what its graph does. In: source text, or a `StitchedSource`, and the stitching graph. Out: a `Proof`, or an `EmitError`.

The text is traced by `trace_text`, which knows nothing of how it was made; the graph is walked here, and each of its nodes must
be the next event of the text: same callable, same operands in the same places, constants equal by type and bit. Nothing of the
text is executed or imported, and nothing of the lowering is relied on.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
import torch.fx

from piecework.codegen.graph.origin import node_where, value_of
from piecework.codegen.graph.structure import attribute_of
from piecework.codegen.proof.grammar import check_grammar, line_at, parse_text
from piecework.codegen.proof.operands import Operands, same_constant
from piecework.codegen.proof.trace import (
    Bound,
    Event,
    Input,
    Known,
    Linkage,
    Value,
    picked,
)
from piecework.codegen.proof.trace_text import EntryParameter, TextTrace, trace_text
from piecework.errors import EmitError


@dataclass(frozen=True, slots=True)
class Proof:
    """What was proved equal: the number of events (calls), and of statements that were run abstractly to get them."""

    events: int
    statements: int


def verify_text(
    code: str,
    split_gm: torch.fx.GraphModule,
    linked: Linkage,
    *,
    lifetimes: bool = True,
    tree: ast.Module | None = None,
) -> Proof:
    """Prove that ``code`` computes what ``split_gm`` computes, in the same order.

    Args:
        code: an emitted module, edited or not.
        split_gm: the stitching graph.
        linked: what the text's names stand for.
        lifetimes: also require that each value is deleted right after its last use.
        tree: ``code``, parsed.

    Raises:
        EmitError: the first difference, with the line of the text and the node of the graph.
    """
    if tree is None:
        tree = parse_text(code)
    check_grammar(code, tree)
    try:
        text = trace_text(code, tree, linked, lifetimes=lifetimes)
        _Matcher(code, text, linked).match(split_gm)
    except RecursionError as error:
        raise EmitError("functions of the text, or graphs, call each other too deeply") from error
    return Proof(events=len(text.events), statements=text.statements)


class _Scope(NamedTuple):
    gm: torch.fx.GraphModule
    prefix: str
    values: dict[torch.fx.Node, Value]


class _Matcher:
    """Walks the graph and holds each node against the next event of the text."""

    def __init__(self, code: str, text: TextTrace, linked: Linkage) -> None:
        self.code = code
        self.text = text
        self.submod_names = frozenset(linked.submod_names)
        self.bound, self.direct = linked.bound_placeholders, linked.direct
        self.next = 0
        self.operands = Operands()
        # For unpacked events: what is recorded of their results in the graph, and a node that uses one as a whole.
        self.recorded: dict[Event, list[Sequence[object]]] = {}
        self.whole: dict[Event, torch.fx.Node] = {}

    def match(self, split_gm: torch.fx.GraphModule) -> None:
        scope = _Scope(split_gm, "", {})
        passed: list[torch.fx.Node] = []
        for node in split_gm.graph.find_nodes(op="placeholder"):
            if node.name in self.bound:
                scope.values[node] = Bound(self.bound[node.name])
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
        if not self.operands.same(returned, self.text.returned):
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
        default = self.operands.value(node.args[0], {})
        return bool(self.operands.same(default, parameter.default))

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
                return self.operands.value(node.args[0], values), node
        return Known(None), None

    def _picked(self, node: torch.fx.Node, scope: _Scope) -> Value | None:
        """The element that ``node`` picks, if the text has it too without doing anything for it."""
        if len(node.args) != 2 or node.kwargs:
            return None
        source, index = node.args
        if not isinstance(source, (torch.fx.Node, tuple, list)):
            return None
        value = self.operands.value(source, scope.values)
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
        return picked(self.operands.escapes.elements_of(value), index)

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
            inner.values[placeholder] = self.operands.value(arg, scope.values)
        by_name = {str(placeholder.target): placeholder for placeholder in placeholders}
        for key, arg in node.kwargs.items():
            if key not in by_name or by_name[key] in inner.values:
                raise EmitError(f"{path!a} does not take {key!a}", where=node_where(node))
            inner.values[by_name[key]] = self.operands.value(arg, scope.values)
        for placeholder in placeholders:
            if placeholder not in inner.values and placeholder.args:
                inner.values[placeholder] = self.operands.value(placeholder.args[0], {})
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
            if not self.operands.is_same(arg, theirs, values):
                self._differ(node, event, f"another argument {place}")
        if kwargs:
            for (key, arg), (name, theirs) in zip(kwargs.items(), event.kwargs, strict=True):
                if key != name or not self.operands.is_same(arg, theirs, values):
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
            if not picks or type(index) is not int:
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
        return str(line_at(self.code, event.line))


def _returned_by(callee: object) -> object:
    """The container that a called graph returns, or what is recorded of the node that it returns."""
    if not isinstance(callee, torch.fx.GraphModule):
        return None
    outputs = callee.graph.find_nodes(op="output")
    returned = outputs[0].args[0] if outputs else None
    return value_of(returned) if isinstance(returned, torch.fx.Node) else returned
