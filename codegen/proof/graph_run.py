"""What a graph does, by running it on tokens as `torch.fx.Interpreter` would: its calls in order, with their operands, and what it returns."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx
from torch.fx.immutable_collections import immutable_dict, immutable_list

from piecework.codegen.graph.origin import node_where, value_of
from piecework.codegen.graph.structure import attribute_of, structure_of
from piecework.codegen.plan.literals import same_literal
from piecework.codegen.split.regions import has_regions, regions_in
from piecework.codegen.stitch.inline import bind_call, returned_value
from piecework.errors import EmitError


@dataclass(frozen=True, slots=True)
class Linkage:
    """What the names of a text stand for.

    Attributes:
        submod_names: what ``__vllm_submods__`` holds, by name; those submodules are opaque, all others are looked into.
        consts: what ``__vllm_consts__`` holds.
        bound: name in the text → path of the weight that it holds.
        bound_placeholders: name of a placeholder → path of the weight that is held for it.
        direct: operator → the callable that the text may call in its place.
    """

    submod_names: Sequence[str] = ()
    consts: Sequence[object] = ()
    bound: Mapping[str, str] = field(default_factory=dict)
    bound_placeholders: Mapping[str, str] = field(default_factory=dict)
    direct: Mapping[object, object] = field(default_factory=dict)


class Token:
    """A value of which nothing is known but where it comes from, and how many elements it has (``kind``: tuple or list)."""

    __slots__ = ("_elements", "kind", "name", "picked", "size", "whole")

    def __init__(self, name: str, kind: type | None = None, size: int = 0) -> None:
        self.name, self.kind, self.size = name, kind, size
        self.whole = False  # the graph uses it otherwise than by picking elements
        self.picked = True  # a node stands for it
        self._elements: dict[int, Token] = {}

    def element(self, index: int) -> Token:
        if index not in self._elements:
            self._elements[index] = each = Token(f"{self.name}[{index}]")
            each.picked = False
        return self._elements[index]

    def elements(self) -> Iterator[tuple[int | None, Token]]:
        return ((index, self.element(index)) for index in range(self.size))

    def has(self, index: object) -> bool:
        return self.kind is not None and type(index) is int and 0 <= index < self.size


@dataclass(frozen=True, slots=True)
class Event:
    """A call: of a function, a method (``.name``), or the submodule called ``submod name``."""

    target: object
    args: tuple[object, ...]
    kwargs: Mapping[str, object]
    result: Token
    node: torch.fx.Node
    region: str = ""  # it opens or closes one


_LISTS = (list, immutable_list)
_DICTS = (dict, immutable_dict)


class Objects:
    """Lists and dicts of one run: those that were handed on may have been changed since."""

    def __init__(self) -> None:
        self._handed: dict[int, object] = {}

    def hand_on(self, value: object) -> None:
        kind = type(value)
        if kind is Token:
            value.whole = True  # type: ignore[attr-defined]
        elif isinstance(value, tuple):
            for each in value:
                self.hand_on(each)
        elif kind in _LISTS or kind in _DICTS:
            self._handed[id(value)] = value
            for each in value.values() if isinstance(value, dict) else value:  # type: ignore[attr-defined]
                self.hand_on(each)
        elif kind is slice:
            self.hand_on((value.start, value.stop, value.step))  # type: ignore[attr-defined]

    def picked(self, value: object, index: object) -> tuple[object, ...]:
        """The element at ``index`` where picking it does nothing; else nothing."""
        if type(value) is Token:
            return (value.element(index),) if value.has(index) else ()  # type: ignore[arg-type]
        sequence = type(value) is tuple or (type(value) in _LISTS and id(value) not in self._handed)
        if not sequence or type(index) is not int or not -len(value) <= index < len(value):  # type: ignore[arg-type]
            return ()
        return (value[index],)  # type: ignore[index]

    @staticmethod
    def made(target: object, args: Sequence[object], kwargs: Mapping[str, object]) -> bool:
        """Whether a call only builds a value of its arguments: a slice, a namedtuple."""
        named = (
            isinstance(target, type) and issubclass(target, tuple) and hasattr(target, "_fields")
        )
        return not kwargs and (target is slice or named)


class Sameness:
    """Whether an operand of the graph is one of the text; a list or dict is one object in both or in neither."""

    def __init__(self) -> None:
        self._texts: dict[int, object] = {}
        self._graphs: dict[int, object] = {}

    def same(self, ours: object, theirs: object) -> bool:
        if ours is theirs:
            return True
        kind = type(ours)
        if kind is Token or type(theirs) is Token:
            return False
        if kind in _LISTS:
            return type(theirs) in _LISTS and self._one(ours, theirs) and self._all(ours, theirs)
        if kind in _DICTS:
            if type(theirs) not in _DICTS or not self._one(ours, theirs):
                return False
            keys = self._all([*ours], [*theirs])  # type: ignore[misc]
            return keys and self._all([*ours.values()], [*theirs.values()])  # type: ignore[attr-defined]
        if kind is slice and type(theirs) is slice:
            parts = ((each.start, each.stop, each.step) for each in (ours, theirs))  # type: ignore[attr-defined]
            return self._all(*parts)
        if isinstance(ours, tuple) and kind is not torch.Size:
            return type(theirs) is kind and self._all(ours, theirs)
        return same_constant(ours, theirs)

    def _all(self, ours: Any, theirs: Any) -> bool:
        return len(ours) == len(theirs) and all(map(self.same, ours, theirs))

    def _one(self, ours: object, theirs: object) -> bool:
        text = self._texts.setdefault(id(ours), theirs)
        return text is theirs and self._graphs.setdefault(id(theirs), ours) is ours


def same_constant(left: object, right: object) -> bool:
    """The same object, or two that nothing but identity can tell apart: equal type and bits."""
    if left is right:
        return True
    if isinstance(left, torch.fx.GraphModule) and isinstance(right, torch.fx.GraphModule):
        hooks = (left._forward_hooks, left._forward_pre_hooks, right._forward_hooks)
        plain = not any((*hooks, right._forward_pre_hooks)) and left.training == right.training
        return plain and structure_of(left).key == structure_of(right).key
    if type(left) is not type(right):
        return False
    if type(left) in (torch.device, torch.Size):
        return bool(left == right)
    return bool(same_literal(left, right))


# --- the graph -------------------------------------------------------------------------------------


@dataclass(slots=True)
class GraphRun:
    """What a graph did.

    Attributes:
        events: its calls, in order.
        parameters: the placeholders that are passed, each with its token.
        weights: path → token of those that are held.
        returned: what it returns.
    """

    events: list[Event] = field(default_factory=list)
    parameters: list[tuple[torch.fx.Node, Token]] = field(default_factory=list)
    weights: dict[str, Token] = field(default_factory=dict)
    returned: object = None
    objects: Objects = field(default_factory=Objects)
    mutable: frozenset[torch.fx.Node] = frozenset()


def run_graph(split_gm: torch.fx.GraphModule, linked: Linkage) -> GraphRun:
    """Run ``split_gm`` on tokens."""
    mutable: frozenset[torch.fx.Node] = frozenset()
    while True:
        run = GraphRun(mutable=mutable)
        for node in split_gm.graph.find_nodes(op="placeholder"):
            path = linked.bound_placeholders.get(node.name)
            if path is None:
                run.parameters.append((node, Token(node.name)))
            else:
                run.weights[path] = Token(node.name)
        passed = dict(run.parameters)
        tokens = [
            passed.get(node) or run.weights[linked.bound_placeholders[node.name]]
            for node in split_gm.graph.find_nodes(op="placeholder")
        ]
        try:
            run.returned = _Interpreter(split_gm, run, linked, "").run(*tokens)
        except RecursionError as error:
            raise EmitError("graphs call each other too deeply") from error
        run.objects.hand_on(run.returned)
        # A list that is used as a whole may be changed between two picks, so that each pick is a call then.
        changed = {
            event.node for event in run.events if event.result.kind is list and event.result.whole
        }
        if changed <= mutable:
            return run
        mutable |= changed


class _Interpreter:
    """Runs one graph as `torch.fx.Interpreter` does, and records what it calls in a run that its callers share."""

    def __init__(
        self, gm: torch.fx.GraphModule, run: GraphRun, linked: Linkage, prefix: str
    ) -> None:
        self.gm, self.recorded, self.linked, self.prefix = gm, run, linked, prefix
        self.env: dict[torch.fx.Node, object] = {}
        regions = regions_in(gm.graph) if has_regions(gm.graph) else {}
        self.regions = {
            **dict.fromkeys(regions, "opens"),
            **dict.fromkeys(regions.values(), "closes"),
        }

    def run(self, *given: object) -> object:
        values = iter(given)
        for node in self.gm.graph.nodes:
            match node.op:
                case "placeholder":
                    self.env[node] = next(values)
                    continue
                case "get_attr":
                    self.env[node] = attribute_of(self.gm, str(node.target))
                    continue
            args, kwargs = self._operand(node.args), self._operand(node.kwargs)
            match node.op:
                case "output":
                    return args[0]
                case "call_function":
                    self.env[node] = self._call(node, node.target, args, kwargs)
                case "call_method":
                    self.env[node] = self._call(node, f".{node.target}", args, kwargs)
                case _:
                    self.env[node] = self._call_module(node, args, kwargs)
        return None

    def _call_module(
        self, node: torch.fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> object:
        path = f"{self.prefix}.{node.target}" if self.prefix else str(node.target)
        callee = attribute_of(self.gm, str(node.target))
        if path in self.linked.submod_names:
            return self._call(node, f"submod {path}", args, kwargs, callee)
        if not isinstance(callee, torch.fx.GraphModule):
            raise EmitError(
                f"module {path!a} is not among the names of __vllm_submods__",
                where=node_where(node),
            )
        given = [self._operand(value) for _, value in bind_call(node, callee)]
        result = _Interpreter(callee, self.recorded, self.linked, path).run(*given)
        if type(result) is Token and result.kind is None and node not in self.recorded.mutable:
            result.kind, result.size = _elements(node, None)
        return result

    def _operand(self, value: Any) -> Any:
        try:
            return torch.fx.node.map_arg(value, self.env.__getitem__)  # type: ignore[arg-type]
        except KeyError as error:
            where = node_where(error.args[0])
            raise EmitError("a node is used before it is defined", where=where) from None

    def _call(
        self,
        node: torch.fx.Node,
        target: object,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        callee: object = None,
    ) -> object:
        run = self.recorded
        if target is operator.getitem and len(args) == 2 and not kwargs:
            picked = run.objects.picked(*args)
            if picked:
                if type(args[0]) is Token:
                    picked[0].name, picked[0].picked = node.name, True  # type: ignore[attr-defined]
                return picked[0]
        if run.objects.made(target, args, kwargs):
            return target(*args)  # type: ignore[operator]
        picks = target is operator.getitem and len(args) == 2 and type(args[1]) is int
        for each in (*args, *kwargs.values()):
            if not (picks and type(each) is Token):
                run.objects.hand_on(each)
        kind, size = (None, 0) if node in run.mutable else _elements(node, callee)
        result = Token(node.name, kind, size)
        region = self.regions.get(node, "")
        run.events.append(Event(target, args, kwargs, result, node, region))
        return result


def _elements(node: torch.fx.Node, callee: object) -> tuple[type | None, int]:
    """What is known of the elements of a result: of a tuple, or of a list that nobody else holds."""
    value = value_of(node)
    if value is None and isinstance(callee, torch.fx.GraphModule):
        value = returned_value(callee.graph)
        value = value_of(value) if isinstance(value, torch.fx.Node) else value
    if type(value) is tuple:
        return tuple, len(value)
    if type(value) in _LISTS:
        return list, len(value)  # type: ignore[arg-type]
    return None, 0
