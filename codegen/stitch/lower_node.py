"""From one node to one statement. In: an FX node, what is known of the nodes before it, and what its module's functions share. Out: an `ir.Statement`.

What cannot be written is an `UnsupportedNode` that names the node and its source line. Nothing is executed and the graph is not changed.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.fx
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket

from piecework.codegen.graph.consts import LIST_TYPES, ConstTable, describe, to_text
from piecework.codegen.graph.origin import (
    SymbolNames,
    node_where,
    origin_of,
    origin_of_piece,
    value_of,
)
from piecework.codegen.graph.structure import attribute_of, is_liftable
from piecework.codegen.graph.targets import INFIX, PREFIX, FunctionPath, function_path, sign_of
from piecework.codegen.plan import ir
from piecework.codegen.plan.literals import is_inline_literal, literal_text
from piecework.codegen.plan.names import SUBMODS, NameTable, is_identifier
from piecework.codegen.plan.one_line import (
    arguments_text,
    attribute_text,
    call_text,
    operand,
    targets_text,
)
from piecework.codegen.stitch.inline import InlinePlan, bind_call, is_plain, returned_value
from piecework.errors import UnsupportedNode

_SEQUENCES = (*LIST_TYPES, tuple)
_OPS = (OpOverload, OpOverloadPacket, HigherOrderOperator)

# What a graph's nodes stand for while it is lowered: a local, a constant, or the caller's expression.
Scope = dict[torch.fx.Node, str]


class ModuleState:
    """What the functions of one module have in common: constants, imports, aliases, and which submodules are inlined as what."""

    def __init__(self, plan: InlinePlan, *, line_numbers: bool) -> None:
        self.plan = plan
        self.line_numbers = line_numbers
        self.consts = ConstTable()
        self.symbols = SymbolNames()
        self.imports: set[str] = set()
        self.alias_of: dict[int, str] = {}
        self.submod_index: dict[str, int] = {}
        self.function_names: dict[str, str] = {}
        self.takes_submods: dict[str, bool] = {}
        self._paths: dict[int, FunctionPath | None] = {}

    def path_of(self, target: object) -> FunctionPath | None:
        """The dotted path to a function, if there is one."""
        # The graphs keep their targets alive, so an id stays its own.
        if id(target) not in self._paths:
            self._paths[id(target)] = function_path(target)
        return self._paths[id(target)]

    def function(self, node: torch.fx.Node) -> str:
        """How the function that ``node`` calls is written; notes the import that it needs."""
        alias = self.alias_of.get(id(node.target))
        if alias is not None:
            return alias
        path = self.path_of(node.target)
        if path is None:
            return self.consts.add(node.target)
        if path.module is not None:
            self.imports.add(path.module)
        return str(path.path)

    def submod(self, target: str) -> int:
        """The place of a submodule in ``__vllm_submods__``."""
        return self.submod_index.setdefault(target, len(self.submod_index))


class NodeLowering:
    """Lowers one node, in one graph and scope."""

    def __init__(
        self,
        module: ModuleState,
        gm: torch.fx.GraphModule,
        names: NameTable,
        scope: Scope,
        prefix: str,
        lifted: Mapping[tuple[int, int], str],
        number: int,
    ) -> None:
        self.module = module
        self.gm = gm
        self.names = names
        self.scope = scope
        self.prefix = prefix
        self.lifted = lifted
        self.number = number
        self.ordinal = 0
        self.uses: list[str] = []
        self.behind: dict[torch.fx.Node, list[str]] = {}  # the names in what a node stands for

    def statement(self, node: torch.fx.Node) -> ir.Statement | None:
        """The statement that ``node`` becomes; None if it becomes an operand of others."""
        match node.op:
            case "get_attr":
                self.scope[node] = self._attribute(node)
                return None
            case "call_function":
                return self._call_function(node)
            case "call_method":
                return self._call_method(node)
            case "call_module":
                return self._call_module(node)
            case "output":
                text = f"return {self._text(node.args[0], node)}"
                return ir.Statement(text, "return", uses=self._used(), origin=self._origin(node))
            case _:
                raise UnsupportedNode(f"node kind {node.op!a}", where=node_where(node))

    def _attribute(self, node: torch.fx.Node) -> str:
        target = str(node.target)
        try:
            value = attribute_of(self.gm, target)
        except AttributeError as error:
            raise UnsupportedNode(
                f"get_attr reads {target!a}, which the graph's module does not have",
                where=node_where(node),
            ) from error
        again = attribute_of(self.gm, target)
        if again is not value and not (is_inline_literal(value) and again == value):
            raise UnsupportedNode(
                f"get_attr reads {target!a}, which is another object at each reading (a property or a parametrization)",
                where=node_where(node),
                hint="call the module that computes it, or remove the parametrization",
            )
        path = f"{self.prefix}.{target}" if self.prefix else target
        return self.module.consts.add(value, attribute=path)

    def _call_function(self, node: torch.fx.Node) -> ir.Statement:
        if not callable(node.target):
            raise UnsupportedNode(
                f"call_function of {describe(node.target)}, which is not callable",
                where=node_where(node),
            )
        text = None
        if not node.kwargs and any(isinstance(arg, torch.fx.Node) for arg in node.args):
            text = self._with_sign(node)
        if text is None:
            text = call_text(self.module.function(node), self._arguments(node))
            targets, unpack = self._targets(node)
        else:
            name = self._target(node)
            targets, unpack = () if name is None else (name,), False
        return self._statement(text, targets, unpack, self._origin(node))

    def _with_sign(self, node: torch.fx.Node) -> str | None:
        """``x[i]``, ``x.a``, ``x + y`` and ``-x`` for the functions that mean just that.

        Only where an operand is a value: ``-(1)`` would read back as a literal, ``(1)[x]`` draws a warning.
        """
        args, target = node.args, node.target
        on_value = isinstance(args[0], torch.fx.Node)
        if len(args) == 2 and target is operator.getitem and on_value:
            value = operand(self._text(args[0], node), receiver=True)
            return f"{value}[{self._text(args[1], node, index=True)}]"
        if len(args) == 2 and target is getattr and on_value and type(args[1]) is str:
            if not is_identifier(args[1]):
                return None
            return attribute_text(self._text(args[0], node), args[1])
        sign = sign_of(INFIX if len(args) == 2 else PREFIX, target) if len(args) <= 2 else None
        if sign is None:
            return None
        texts = [operand(self._text(arg, node)) for arg in args]
        if len(texts) == 1:
            return f"{sign}{' ' if sign == 'not' else ''}{texts[0]}"
        return f"{texts[0]} {sign} {texts[1]}"

    def _call_method(self, node: torch.fx.Node) -> ir.Statement:
        if not node.args or type(node.target) is not str:
            raise UnsupportedNode("call_method without a receiver", where=node_where(node))
        receiver = attribute_text(self._text(node.args[0], node), node.target)
        text = call_text(receiver, self._arguments(node, skip=1))
        return self._statement(text, *self._targets(node), self._origin(node))

    def _call_module(self, node: torch.fx.Node) -> ir.Statement:
        path = f"{self.prefix}.{node.target}" if self.prefix else str(node.target)
        inlined = self.module.plan.by_target.get(path)
        if inlined is None:
            try:
                callee = attribute_of(self.gm, str(node.target))
            except AttributeError as error:
                raise UnsupportedNode(
                    f"call_module of {node.target!a}, which the graph's module does not have",
                    where=node_where(node),
                ) from error
            index = self.module.submod(path)
            arguments = self._arguments(node)
            piece = ir.PieceCall(index, arguments, self._leaves(node))
            text = call_text(f"{SUBMODS}[{index}]", arguments)
            return self._statement(
                text, *self._targets(node, callee), self._origin(node, callee), piece
            )
        callee = inlined.graph_of[path]
        if inlined.direct_call:
            return self._call_direct(node, callee, path)
        # Positional only: parameters may have got other names than their placeholders.
        given = [self._text(value, node) for _, value in bind_call(node, callee)]
        given += [literal_text(value) for value in inlined.lifted_values[path]]
        name = self.module.function_names[inlined.key]
        passes = self.module.takes_submods[name]
        text = call_text(name, ", ".join([*given, *[f"{SUBMODS}={SUBMODS}"] * passes]))
        made = self._statement(text, *self._targets(node, callee), self._origin(node, callee))
        return replace(made, kind="nested") if passes else made

    def _call_direct(
        self, node: torch.fx.Node, callee: torch.fx.GraphModule, path: str
    ) -> ir.Statement:
        """Write the one call that ``callee`` consists of in place of a call of ``callee``."""
        scope: Scope = {}
        inside = NodeLowering(self.module, callee, self.names, scope, path, {}, self.number)
        before = self.uses
        for inner, value in bind_call(node, callee):
            self.uses = inside.behind[inner] = []
            scope[inner] = self._text(value, node)
        self.uses = before
        for inner in callee.graph.find_nodes(op="get_attr"):
            scope[inner] = inside._attribute(inner)
        (call,) = (n for n in callee.graph.nodes if n.op == "call_function")
        text = call_text(self.module.function(call), inside._arguments(call))
        self.uses += inside.uses
        if returned_value(callee.graph) is None:
            targets: tuple[str, ...] = ()
            unpack = False
            self.scope[node] = "None"
        else:
            targets, unpack = self._targets(node, callee)
        origin = origin_of(call, self.module.symbols, line_numbers=self.module.line_numbers)
        return self._statement(text, targets, unpack, origin)

    def _statement(
        self,
        text: str,
        targets: tuple[str, ...],
        unpack: bool,
        origin: ir.Origin,
        piece: ir.PieceCall | None = None,
    ) -> ir.Statement:
        text = targets_text(targets, unpack) + text
        return ir.Statement(text, "", targets, unpack, self._used(), origin, piece)

    def _used(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.uses))

    # --- operands and targets --------------------------------------------------------------------

    def _text(self, value: object, node: torch.fx.Node, *, index: bool = False) -> str:
        literal = self._literal if self.lifted else literal_text
        return to_text(
            value, self._refer, self.module.consts, partial(node_where, node), literal, index=index
        )

    def _literal(self, value: object) -> str:
        """The literal itself, or the parameter that it was lifted to; counts as `structure_of` counts."""
        if not is_liftable(value):
            return literal_text(value)
        lifted = self.lifted.get((self.number, self.ordinal))
        self.ordinal += 1
        return literal_text(value) if lifted is None else lifted

    def _refer(self, node: torch.fx.Node) -> str:
        text = self.scope.get(node)
        if text is None:
            raise UnsupportedNode("a node is used before it is defined", where=node_where(node))
        if node in self.behind:
            self.uses += self.behind[node]
        elif is_identifier(text):
            self.uses.append(text)
        return text

    def _arguments(self, node: torch.fx.Node, skip: int = 0) -> str:
        args = [self._text(arg, node) for arg in node.args[skip:]]
        return arguments_text(args, [(k, self._text(v, node)) for k, v in node.kwargs.items()])

    def _leaves(self, node: torch.fx.Node) -> tuple[str, ...] | None:
        """The arguments of a piece's call in the order in which a capture flattens them."""
        found: list[str] = []
        ordinal = self.ordinal
        pending: list[Any] = [*reversed(node.args)]
        while pending:
            each = pending.pop()
            if type(each) in _SEQUENCES:
                pending += reversed(each)
            elif isinstance(each, (dict, slice)):
                return None
            else:
                found.append(self._text(each, node))
        self.ordinal = ordinal  # they were counted already
        return None if node.kwargs else tuple(found)

    def _target(self, node: torch.fx.Node) -> str | None:
        if not node.users:
            return None
        name = str(self.names.claim(node.name))
        self.scope[node] = name
        return name

    def _targets(self, node: torch.fx.Node, callee: object = None) -> tuple[tuple[str, ...], bool]:
        """Names for the results: one per element when every user picks an element, else one or none."""
        if not node.users:
            return (), False
        arity = _arity(node, callee)
        if arity is None or not all(_picks_element(user, node, arity) for user in node.users):
            target = self._target(node)
            assert target is not None
            return (target,), False
        by_index: dict[int, str] = {}
        for user in node.users:
            index = user.args[1]
            assert isinstance(index, int)
            if index not in by_index:
                by_index[index] = self.names.claim(user.name)
            self.scope[user] = by_index[index]
        unused = [i for i in range(arity) if i not in by_index]
        for index in unused:
            by_index[index] = self.names.claim("unused")
        return tuple(by_index[i] for i in range(arity)), True

    def _origin(self, node: torch.fx.Node, callee: object = None) -> ir.Origin:
        numbers = self.module.line_numbers
        if isinstance(callee, torch.fx.GraphModule):
            return origin_of_piece(callee, self.module.symbols, line_numbers=numbers)
        return origin_of(node, self.module.symbols, line_numbers=numbers)


def _picks_element(user: torch.fx.Node, producer: torch.fx.Node, arity: int) -> bool:
    return (
        user.op == "call_function"
        and user.target is operator.getitem
        and len(user.args) == 2
        and not user.kwargs
        and user.args[0] is producer
        and type(user.args[1]) is int
        and 0 <= user.args[1] < arity
    )


def _arity(node: torch.fx.Node, callee: object) -> int | None:
    """How many elements the tuple or list that ``node`` yields is known to have; None if unknown."""
    if is_plain(callee):
        assert isinstance(callee, torch.fx.GraphModule)
        returned = returned_value(callee.graph)
        if not isinstance(returned, torch.fx.Node):
            if isinstance(returned, (tuple, list)) and type(returned) in _SEQUENCES:
                return len(returned)
            return None
        node = returned
    value = value_of(node)
    if type(value) is not tuple and not (type(value) is list and isinstance(node.target, _OPS)):
        return None  # a list that somebody else holds may have changed by the time an element is picked
    return len(value)
