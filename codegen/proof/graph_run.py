"""What a graph does, by running it on tokens: its calls in order and its result."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx
from torch.fx.immutable_collections import immutable_dict, immutable_list

from piecework.codegen.graph.consts import holds_node
from piecework.codegen.graph.origin import node_where, value_of
from piecework.codegen.graph.structure import attribute_of, structure_of
from piecework.codegen.plan.literals import same_literal
from piecework.codegen.split.regions import regions_in
from piecework.codegen.stitch.inline import bind_call, returned_value
from piecework.errors import EmitError


@dataclass(frozen=True, slots=True)
class Linkage:
    """What the names of a text stand for."""

    # what ``__vllm_submods__`` holds, by name; those submodules are opaque, all others are looked
    # into
    submod_names: Sequence[str] = ()
    consts: Sequence[object] = ()  # what ``__vllm_consts__`` holds
    # placeholder of a weight that the module holds → its name in the text
    bound: Mapping[str, str] = field(default_factory=dict)
    # operator → the callable that the text may call in its place
    direct: Mapping[object, object] = field(default_factory=dict)


class Token:
    """A value of which nothing is known but its ``size``, if it is a tuple or list."""

    __slots__ = ("_elements", "size")

    def __init__(self, size: int | None = None) -> None:
        self.size = size
        self._elements: dict[int, Token] = {}

    def element(self, index: int) -> Token:
        return self._elements.setdefault(index, Token())

    def __iter__(self) -> Iterator[Token]:
        if self.size is None:
            raise TypeError("a result is unpacked that is not known to be a tuple or list")
        return map(self.element, range(self.size))


@dataclass(frozen=True, slots=True)
class Named:
    """What is called by its name: a ``method``, or a ``submod``."""

    kind: str
    name: str


@dataclass(frozen=True, slots=True)
class Event:
    """A call of a function, a method or a submodule."""

    target: object
    args: tuple[object, ...]
    kwargs: Mapping[str, object]
    result: Token
    node: torch.fx.Node
    region: str = ""  # it opens or closes one


_LISTS = (list, immutable_list)
_DICTS = (dict, immutable_dict)


def picked(value: object, index: object) -> tuple[object, ...]:
    """The element at ``index`` where picking it is no call; else nothing."""
    if type(index) is not int:
        return ()
    if isinstance(value, Token):
        return (value.element(index),) if 0 <= index < (value.size or 0) else ()
    known = type(value) is tuple or type(value) in _LISTS
    return (value[index],) if known and -len(value) <= index < len(value) else ()  # type: ignore[arg-type, index]


def builds(target: object, kwargs: Mapping[str, object]) -> bool:
    """Whether a call only builds a value of its arguments: a slice, a namedtuple."""
    named = isinstance(target, type) and issubclass(target, tuple) and hasattr(target, "_fields")
    return not kwargs and (target is slice or named)


class Sameness:
    """Whether an operand of the graph is one of the text."""

    def __init__(self) -> None:
        self._texts: dict[int, object] = {}
        self._graphs: dict[int, object] = {}

    def same(self, ours: object, theirs: object) -> bool:
        if ours is theirs:
            return True
        kind = type(ours)
        match ours:
            case Token():
                return False
            case list() if kind in _LISTS:
                alike = type(theirs) in _LISTS and self._one(ours, theirs)
                return alike and self._all(ours, theirs)
            case dict() if kind in _DICTS:
                alike = type(theirs) in _DICTS and self._one(ours, theirs)
                return alike and self._all([*ours.items()], [*theirs.items()])  # type: ignore[attr-defined]
            case slice() if isinstance(theirs, slice):
                return self._all(*((each.start, each.stop, each.step) for each in (ours, theirs)))
            case tuple() if kind is not torch.Size:
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
        hooks = [
            h for each in (left, right) for h in (each._forward_hooks, each._forward_pre_hooks)
        ]
        plain = not any(hooks) and left.training == right.training
        return plain and structure_of(left).key == structure_of(right).key
    if isinstance(left, (torch.device, torch.Size)):
        return type(left) is type(right) and bool(left == right)
    return same_literal(left, right)


@dataclass(slots=True)
class GraphRun:
    """What a graph did, and what it returned."""

    events: list[Event] = field(default_factory=list)  # its calls in order
    parameters: list[tuple[torch.fx.Node, Token]] = field(default_factory=list)  # what is passed
    held: dict[str, Token] = field(default_factory=dict)  # weights that the text holds, by name
    returned: object = None


def run_graph(split_gm: torch.fx.GraphModule, linked: Linkage) -> GraphRun:
    """Run ``split_gm`` on tokens."""
    run, tokens = GraphRun(), []
    for node in split_gm.graph.find_nodes(op="placeholder"):
        tokens.append(Token())
        if node.name in linked.bound:
            run.held[linked.bound[node.name]] = tokens[-1]
        else:
            run.parameters.append((node, tokens[-1]))
    try:
        run.returned = _Interpreter(split_gm, run, linked, "").run(*tokens)
    except RecursionError as error:
        raise EmitError("graphs call each other too deeply") from error
    return run


class _Interpreter:
    """Runs one graph on tokens, and those that it calls."""

    def __init__(
        self, gm: torch.fx.GraphModule, run: GraphRun, linked: Linkage, prefix: str
    ) -> None:
        self.module, self.recorded, self.linked, self.prefix = gm, run, linked, prefix
        self.values: dict[torch.fx.Node, Any] = {}
        regions = regions_in(gm.graph)
        self.regions = {each.leave: "closes" for each in regions}
        self.regions |= {each.enter: "opens" for each in regions}

    def run(self, *tokens: Any) -> Any:
        given = iter(tokens)
        for node in self.module.graph.nodes:
            # One token for what a star collects.
            value = next(given) if node.op == "placeholder" else self._run_node(node)
            if node.op == "output":
                return value
            self.values[node] = value
        return None

    def _operand(self, value: Any) -> Any:
        """A node's value; lists and dicts are made anew, as a text does each time that it runs."""
        kind = type(value)
        if kind is torch.fx.Node:
            return self.values[value]
        if kind is tuple or kind in _LISTS:
            return kind(map(self._operand, value))
        if kind in _DICTS:
            return {key: self._operand(each) for key, each in value.items()}
        if kind is slice:
            return slice(*map(self._operand, (value.start, value.stop, value.step)))
        if hasattr(kind, "_fields") and holds_node(value):  # else it is a constant of the text
            return kind(*map(self._operand, value))
        return value

    def _run_node(self, node: torch.fx.Node) -> Any:
        args, kwargs = self._operand(node.args), self._operand(node.kwargs)
        match node.op:
            case "call_module":
                return self._call_module(node, args, kwargs)
            case "call_method":
                return self._call(node, Named("method", str(node.target)), args, kwargs)
            case "call_function":
                return self._call(node, node.target, args, kwargs)
            case "get_attr":
                return attribute_of(self.module, str(node.target))
        return args[0]

    def _call_module(self, node: torch.fx.Node, args: Any, kwargs: Any) -> object:
        path = f"{self.prefix}.{node.target}" if self.prefix else str(node.target)
        callee = attribute_of(self.module, str(node.target))
        if path in self.linked.submod_names:
            return self._call(node, Named("submod", path), args, kwargs, callee)
        if not isinstance(callee, torch.fx.GraphModule):
            why = f"module {path!a} is not among the names of __vllm_submods__"
            raise EmitError(why, where=node_where(node))
        bound: Any = [value for _, value in bind_call(node, callee)]
        given: Any = self._operand(bound)
        result = _Interpreter(callee, self.recorded, self.linked, path).run(*given)
        if isinstance(result, Token) and result.size is None:
            result.size = _size(node, None)
        return result

    def _call(
        self, node: torch.fx.Node, target: object, args: Any, kwargs: Any, callee: object = None
    ) -> object:
        if target is operator.getitem and len(args) == 2 and not kwargs:
            found = picked(*args)
            if found:
                return found[0]
        if builds(target, kwargs):
            return target(*args)  # type: ignore[operator]
        result = Token(_size(node, callee))
        region = self.regions.get(node, "")
        self.recorded.events.append(Event(target, args, kwargs, result, node, region))
        return result


def _size(node: torch.fx.Node, callee: object) -> int | None:
    """How many elements a result has, if it is known to be a tuple or list."""
    value = value_of(node)
    if value is None and isinstance(callee, torch.fx.GraphModule):
        value = returned_value(callee.graph)
        value = value_of(value) if isinstance(value, torch.fx.Node) else value
    return len(value) if type(value) is tuple or type(value) in _LISTS else None  # type: ignore[arg-type]
