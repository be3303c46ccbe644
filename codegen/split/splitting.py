"""Operators that a graph is cut at: which nodes call one, and whether an operator is fit for it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.fx
from torch._ops import OpOverload, OpOverloadPacket

from piecework.codegen.graph.schemas import overloads_of, shows_nothing, writes_to
from piecework.errors import SplitError, short_errors

SplittingOp = str | OpOverload | OpOverloadPacket | Callable[..., object]


@dataclass(frozen=True, slots=True)
class SplitItem:
    """One submodule of the stitching graph.

    Attributes:
        submod_name: its name in ``split_gm``.
        graph_id: its place in the order of execution.
        is_splitting_graph: True if it is not compiled: splitting operators, or nothing but views.
        graph: the submodule.
    """

    submod_name: str
    graph_id: int
    is_splitting_graph: bool
    graph: torch.fx.GraphModule


class SplittingOps:
    """Tells whether a node calls one of the given operators; ``declared`` are their names."""

    def __init__(self, ops: Iterable[SplittingOp]) -> None:
        listed = isinstance(ops, Iterable) and not isinstance(ops, (OpOverloadPacket, Mapping))
        if isinstance(ops, str) or not listed:
            raise SplitError(
                f"splitting ops must be a list; got {ops!s:.80}",
                hint="pass a list of them; [] cuts nowhere",
            )
        self._names: set[str] = set()
        self._targets: list[object] = []
        self.declared: list[str] = []
        for op in ops:
            op = getattr(op, "splitting_op_name", op)  # the handle of `piecework.splitting_op`
            name = op if isinstance(op, str) else operator_name(op)
            if isinstance(op, OpOverload):
                name = f"{name}.{op._overloadname}"
            if name is None and callable(op):
                name = _name_of(op)
                self._targets.append(op)
            elif name is None:
                raise SplitError(
                    f"splitting op {op} is neither a name nor an operator that a forward calls",
                    hint="write 'ns::op', torch.ops.ns.op, or a function that the model calls, such as torch.sin",
                )
            elif name.count("::") != 1 or not all(name.split("::")):
                raise SplitError(
                    f"splitting op {name!a} is not of the form 'ns::op' or 'ns::op.overload'",
                    hint="name it as in torch.ops.ns.op, or pass the operator or the function itself, without quotes",
                )
            else:
                self._names.add(name)
            self.declared.append(name)

    def __call__(self, node: torch.fx.Node) -> bool:
        if node.op != "call_function":
            return False
        if self._names and not self._names.isdisjoint(names_of(node)):
            return True
        return any(node.target is target for target in self._targets)

    def missing_from(self, graph: torch.fx.Graph) -> list[str]:
        """Declared operators that no node of ``graph`` calls."""
        present: set[str] = set()
        for node in graph.nodes:
            if node.op == "call_function":
                present |= {*names_of(node), _name_of(node.target)}
        return [name for name in self.declared if name not in present]


def _name_of(function: object) -> str:
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
    """The names under which the operator that ``node`` calls may be declared."""
    target: object = node.target
    if isinstance(target, torch._ops.HigherOrderOperator) and node.args:
        target = node.args[0]  # auto_functionalized(op, ...) runs op
    name = operator_name(target)
    if name is None:
        return set()
    overloads = overloads_of(target)  # which one of several runs is decided by the arguments
    return {name, f"{name}.{overloads[0]._overloadname}"} if len(overloads) == 1 else {name}


_RECURRENT = (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)


def recurrent_layers(graph: torch.fx.Graph) -> list[Callable[..., object]]:
    """torch's recurrent layers in ``graph``: a compiler would unroll them, fixing the length."""
    called = {node.target for node in graph.nodes if node.op == "call_function"}
    return [layer for layer in _RECURRENT if layer in called]


@dataclass(frozen=True, slots=True)
class OpReport:
    """What is known of an operator."""

    name: str  # ``ns::op.overload``
    schema: str  # its schema, as text
    mutates: tuple[str, ...]  # names of the arguments that it changes
    returns: tuple[str, ...]  # types of what it returns
    problems: tuple[str, ...]  # why it is not fit to be a splitting op; empty if it is

    @property
    def fit(self) -> bool:
        return not self.problems

    @property
    def style(self) -> str:
        """Where results go: ``"out-buffer"``, ``"fresh outputs"``, ``"both"`` or ``"none"``."""
        if self.mutates:
            return "both" if self.returns else "out-buffer"
        return "fresh outputs" if self.returns else "none"


@short_errors
def check_op(
    op: SplittingOp,
    args: Sequence[object] | None = None,
    kwargs: Mapping[str, object] | None = None,
) -> OpReport:
    """Tell whether ``op`` is fit to be a splitting op: schema, fake implementation, mutation, results.

    Args:
        op: ``"ns::op"``, ``"ns::op.overload"``, an operator, or what `piecework.splitting_op` returned.
        args, kwargs: arguments to run copies of: only `torch.library.opcheck` can tell whether it does
            what its schema and its fake implementation say.

    Raises:
        SplitError: there is no such operator, or its overload is not clear.

    Example:
        >>> check_op("mylib::attention").problems
        ('it has no fake implementation, so that graphs with it can not be traced',)
    """
    if isinstance(args, torch.Tensor):
        raise SplitError("args must be a tuple of arguments; got a Tensor", hint="pass (x,)")
    overload = _overload(op)
    schema = overload._schema
    problems: list[str] = []
    if any(each.alias_info is not None for each in schema.returns):
        problems.append(
            "it returns an alias of an argument, which a captured piece can not tell from a fresh tensor"
        )
    if shows_nothing(overload):
        problems.append("it neither returns nor changes anything, so that a compiler may drop it")
    if not _has_fake(overload):
        problems.append("it has no fake implementation, so that graphs with it can not be traced")
    elif args is not None or kwargs is not None:
        results = torch.library.opcheck(
            overload,
            tuple(args or ()),
            dict(kwargs or {}),
            test_utils=("test_schema", "test_faketensor"),
            raise_exception=False,
        )
        failures = {" ".join(str(each).split()): None for each in results.values()}
        problems += [
            f"it does not do what its schema and fake say: {text[:300]}"
            for text in failures
            if text != "SUCCESS"
        ]
    return OpReport(
        name=f"{schema.name}.{schema.overload_name or 'default'}",
        schema=str(schema),
        mutates=tuple(each.name for each in schema.arguments if writes_to(each)),
        returns=tuple(str(each.type) for each in schema.returns),
        problems=tuple(problems),
    )


def _overload(op: SplittingOp) -> OpOverload:
    op = getattr(op, "splitting_op_name", op)
    found: object = op
    if isinstance(op, str):
        namespace, _, rest = op.partition("::")
        base, _, overload = rest.partition(".")
        packet = getattr(getattr(torch.ops, namespace, None), base, None) if base else None
        found = getattr(packet, overload, None) if overload else packet
    overloads: tuple[OpOverload, ...] = overloads_of(found)
    if not overloads:
        raise SplitError(
            f"there is no operator {str(op)!a}",
            hint="register it first (piecework.splitting_op), and name it as 'ns::op'",
        )
    if len(overloads) > 1:
        names = ", ".join(each._overloadname for each in overloads)
        raise SplitError(
            f"operator {str(op)!a} has several overloads", hint=f"name one of them: {names}"
        )
    return overloads[0]


def _has_fake(overload: OpOverload) -> bool:
    keys = torch._C.DispatchKey
    made_of_others = (keys.CompositeImplicitAutograd, keys.CompositeExplicitAutograd)
    return any(map(overload.has_kernel_for_dispatch_key, (keys.Meta, *made_of_others)))
