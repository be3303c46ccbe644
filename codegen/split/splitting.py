"""Which nodes a graph is cut at. In: operators by name, overload, packet or function. Out: for each node, whether it calls one of them.

Nothing is cut here, and no operator is run.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
import torch.fx
from torch._ops import OpOverload, OpOverloadPacket

from piecework.codegen.graph.origin import node_where
from piecework.codegen.graph.schemas import overloads_of
from piecework.codegen.graph.structure import attribute_of
from piecework.errors import SplitError

SplittingOp = str | OpOverload | OpOverloadPacket | Callable[..., object]


class SplittingOps:
    """Tells whether a node calls one of the given operators."""

    def __init__(self, ops: Iterable[SplittingOp]) -> None:
        self._names: set[str] = set()
        self._targets: list[object] = []
        self.declared: list[str] = []
        for op in _listed(ops):
            op = getattr(op, "splitting_op_name", op)  # the handle of `piecework.splitting_op`
            if isinstance(op, str):
                if op.count("::") != 1 or not all(op.split("::")):
                    raise SplitError(
                        f"splitting op {op!a} is not of the form 'ns::op' or 'ns::op.overload'",
                        hint=(
                            f"pass the function itself, without quotes: [{op}]"
                            if op.startswith("torch.")
                            else "name it as in torch.ops.ns.op, or pass the operator itself"
                        ),
                    )
                self._names.add(op)
                self.declared.append(op)
            elif isinstance(op, OpOverload):
                self._names.add(f"{op._schema.name}.{op._overloadname}")
                self.declared.append(f"{op._schema.name}.{op._overloadname}")
            elif isinstance(op, OpOverloadPacket):
                self._names.add(op._qualified_op_name)
                self.declared.append(op._qualified_op_name)
            elif isinstance(op, torch.nn.Module) or (
                isinstance(op, type) and issubclass(op, torch.nn.Module)
            ):
                kind = op if isinstance(op, type) else type(op)
                what = "a class of modules" if isinstance(op, type) else "a module of a model"
                raise SplitError(
                    f"splitting op {kind.__qualname__} is {what}; a graph is cut at the operators that forwards call",
                    hint="name the operator that does its work, or make it one with piecework.splitting_op",
                )
            elif callable(op):
                self._targets.append(op)
                self.declared.append(_written(op))
            else:
                raise SplitError(
                    f"splitting op {op!r} is neither a name nor an operator",
                    hint="write 'ns::op', torch.ops.ns.op, or a function that the model calls, such as torch.sin",
                )

    def __call__(self, node: torch.fx.Node) -> bool:
        if node.op != "call_function":
            return False
        if self._names and not self._names.isdisjoint(names_of(node)):
            return True
        return any(node.target is target for target in self._targets)

    def missing_from(self, graph: torch.fx.Graph) -> list[str]:
        """Declared operators that no node of ``graph`` calls."""
        present: set[object] = set()
        for node in graph.nodes:
            if node.op == "call_function":
                present |= names_of(node)
                present.add(_written(node.target))
        return [name for name in self.declared if name not in present]


def _listed(ops: object) -> Iterable[SplittingOp]:
    """``ops``, if it is a list of operators: a text, a packet or a dict can be gone through too, and holds none."""
    if isinstance(ops, str):
        raise SplitError(
            f"splitting ops must be a list; got the text {ops!a}", hint=f"pass [{ops!a}]"
        )
    if isinstance(ops, Iterable) and not isinstance(ops, (OpOverloadPacket, Mapping)):
        return ops
    raise SplitError(
        f"splitting ops must be a list; got {ops!s:.80}",
        hint="pass a list of them; [] cuts nowhere",
    )


def _written(function: object) -> str:
    """A function as code writes it: ``torch.sin``, or its own name."""
    name = str(getattr(function, "__qualname__", repr(function)))
    short = name.rpartition(".")[2]
    return f"torch.{short}" if getattr(torch, short, None) is function else name


def operator_name(target: object) -> str | None:
    """``ns::op`` of an operator or a packet of overloads; None for any other callable."""
    if isinstance(target, OpOverload):
        return str(target._schema.name)
    return str(target._qualified_op_name) if isinstance(target, OpOverloadPacket) else None


def names_of(node: torch.fx.Node) -> set[str]:
    """The names under which the operator that ``node`` calls may be declared: ``ns::op`` and ``ns::op.overload``."""
    target: object = node.target
    if isinstance(target, torch._ops.HigherOrderOperator) and node.args:
        target = node.args[0]  # auto_functionalized(op, ...) runs op
    name = operator_name(target)
    if name is None:
        return set()
    overloads = overloads_of(target)  # which one of several runs is decided by the arguments
    return {name, f"{name}.{overloads[0]._overloadname}"} if len(overloads) == 1 else {name}


def check_cuts(
    gm: torch.fx.GraphModule,
    cut: SplittingOps,
    required: SplittingOps,
    strict: bool | None,
) -> None:
    """Report operators to cut at that the graph does not call, and required ones that would end inside a compiled piece.

    Args:
        strict: True raises, False warns, None keeps silent.

    Raises:
        SplitError: something was found and ``strict`` is True.
    """
    if strict is None:
        return
    problems = [
        (f"splitting op {name!a} is not in the graph", "check its spelling, or leave it out")
        for name in cut.missing_from(gm.graph)
    ]
    for node, depth in _calls(gm, 0):
        if required(node) and not (depth == 0 and cut(node)):
            inside = "inside the subgraph of a higher-order operator" if depth else "not cut at"
            what = f"{node.target} must stay outside of compiled pieces, but is {inside} ({node_where(node)})"
            hint = "move it out of the subgraph" if depth else "name it among the splitting ops"
            problems.append((what, hint))
    if problems and strict:
        raise SplitError("; ".join(text for text, _ in problems), hint=problems[0][1])
    for text, hint in problems:
        warnings.warn(f"{text}. Hint: {hint}", stacklevel=4)


def _calls(gm: torch.fx.GraphModule, depth: int) -> Iterator[tuple[torch.fx.Node, int]]:
    """The calls of ``gm`` and of the graphs that it refers to, each with its depth."""
    for node in gm.graph.nodes:
        if node.op == "call_function":
            yield node, depth
        elif node.op in ("get_attr", "call_module"):
            try:
                value = attribute_of(gm, str(node.target))
            except AttributeError:
                continue
            if isinstance(value, torch.fx.GraphModule):
                yield from _calls(value, depth + 1)


_RECURRENT: tuple[Callable[..., object], ...] = (
    torch.lstm,
    torch.gru,
    torch.rnn_tanh,
    torch.rnn_relu,
)


def recurrent_layers(graph: torch.fx.Graph) -> tuple[Callable[..., object], ...]:
    """The functions of torch that run a whole recurrent layer, as far as ``graph`` calls them.

    They stay outside of compiled pieces: a compiler would unroll them over the sequence, which fixes its length and gains nothing
    over the kernels that torch has for them.
    """
    called = {node.target for node in graph.nodes if node.op == "call_function"}
    return tuple(layer for layer in _RECURRENT if layer in called)
