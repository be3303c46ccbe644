"""Decides what the entry of a trace checks, passes and returns, and has its text emitted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.utils import _pytree as pytree

from piecework.codegen.entry.emit import EntrySource, generate_entry
from piecework.codegen.entry.plan import (
    EntryPlan,
    FromCall,
    FromConst,
    FromItems,
    FromLeaf,
    FromOutput,
    FromWeights,
    Packed,
    Passed,
)
from piecework.codegen.graph.origin import results_of
from piecework.runtime import torch_compat
from piecework.runtime.call.argument_memory import GivenTensor, Written, given_tensors
from piecework.runtime.pieces.program import Program
from piecework.runtime.trace.inputs import Argument, Layout, Size
from piecework.runtime.trace.one_trace import ModelTrace
from piecework.runtime.trace.results import (
    Fixed,
    FromArgument,
    FromGraph,
    FromWeight,
    ResultLeaf,
)
from piecework.runtime.watch.weights import Weight


@dataclass(frozen=True, slots=True)
class MadeEntry:
    """An emitted entry before it is bound.

    Attributes:
        plan: what it says.
        source: the emitted text.
        strict: weights that every reader compares by itself, by path.
        autocast: where autocast was on in the trace.
        given: arguments that have to be apart from tensors of the model.
    """

    plan: EntryPlan
    source: EntrySource
    strict: frozenset[str]
    autocast: tuple[tuple[str, torch.dtype], ...]
    given: tuple[GivenTensor, ...]


def made_entry(captured: ModelTrace, program: Program) -> MadeEntry:
    written = Written.by(captured, program)
    given = given_tensors(captured, written)
    state = captured.weights.state
    watches = bool(given) or state.argument_check(captured.parameters) is not None
    plan = _plan_entry(captured, program, written, watches)
    strict = _strict_weights(captured, program)
    return MadeEntry(plan, generate_entry(plan), strict, torch_compat.autocast_state(), given)


def _plan_entry(
    captured: ModelTrace, program: Program, written: Written, watches_arguments: bool
) -> EntryPlan:
    """Say what the entry must check, pass and return."""
    levers, state = program.config.stitching_config, captured.weights.state
    source = program.source
    bound = {row.path for row in source.module.bound}
    weights = [each for each in captured.inputs if isinstance(each, Weight)]
    numbers = {each.path: number for number, each in enumerate(weights)}
    passed: list[Passed] = []
    for each in captured.inputs:
        match each:
            case Weight(path):
                if path not in bound:
                    passed.append(FromWeights(numbers[path]))
            case Argument(leaf):
                passed.append(captured.assumptions.passed(leaf, None))
            case Size(leaf, dim):
                passed.append(captured.assumptions.passed(leaf, dim))
            case Layout(leaf, stride):
                passed.append(captured.assumptions.layout(leaf, stride))
    weight_at = {id(tensor): number for number, tensor in enumerate(captured.weights.tensors)}
    return EntryPlan(
        banner=(f"model: {program.name}",),
        parameters=captured.parameters,
        symbols=captured.assumptions.symbols(),
        guards=captured.assumptions.guards(),
        passed=tuple(passed),
        outputs=_output_names(captured),
        result=_packed(captured.out_spec, list(captured.result), weight_at),
        batch=_batch(captured, program),
        apart=tuple(
            (leaf, tuple(x for x in written.arguments if x != leaf))
            for leaf in written.in_arguments
        ),
        # A model without weights has modes of its own to watch all the same.
        binds=bool(bound) or not weights,
        watches_arguments=watches_arguments,
        checks=levers.check_inputs or program.config.dynamic_shapes_config.evaluate_guards,
        asks_grad_mode=state.asks_grad_mode,
    )


def _strict_weights(captured: ModelTrace, program: Program) -> frozenset[str]:
    """Weights that every reader compares by itself, by path; see `CompiledPiece.strict_inputs`."""
    placeholders = program.split_gm.graph.find_nodes(op="placeholder")
    return frozenset(
        source.path
        for node, source in zip(placeholders, captured.inputs, strict=True)
        if isinstance(source, Weight)
        and all(_is_strict(user, node, program) for user in node.users)
    )


def _is_strict(user: torch.fx.Node, weight: torch.fx.Node, program: Program) -> bool:
    piece = program.backends.get(str(user.target)) if user.op == "call_module" else None
    if piece is None or user.kwargs:
        return False
    places = {index for index, arg in enumerate(user.args) if arg is weight}
    return all(places <= entry.compiled.strict_inputs for entry in piece.entries.values())


def _batch(captured: ModelTrace, program: Program) -> Passed | None:
    if program.range_table is None or program.batch.symbol is None:
        return None
    index, dim = program.batch.input
    match captured.inputs[index]:
        case Argument(leaf):
            return captured.assumptions.passed(leaf, dim)
        case Size(leaf, size_dim):
            return captured.assumptions.passed(leaf, size_dim)
        case Weight() | Layout():
            return None


def _output_names(captured: ModelTrace) -> tuple[str, ...]:
    outputs = results_of(captured.graph.graph)
    return tuple(each.name if isinstance(each, torch.fx.Node) else "unused" for each in outputs)


def _packed(spec: pytree.TreeSpec, leaves: list[ResultLeaf], weight_at: dict[int, int]) -> Packed:
    """How ``spec`` is rebuilt; takes what it needs from the front of ``leaves``."""
    kind, context, children = torch_compat.spec_parts(spec)
    if kind is None:
        return _packed_leaf(leaves.pop(0), weight_at)
    items = tuple(_packed(child, leaves, weight_at) for child in children)
    if kind in (list, tuple):
        return FromItems(kind, tuple(range(len(items))), items)
    if kind is dict:
        return FromItems(dict, tuple(context), items)  # type: ignore[arg-type]
    if kind is torch.Size:  # which pytree would make a tuple of
        return FromCall(_size, None, "Size", items)
    rebuild = torch_compat.rebuilder(kind)
    if rebuild is not None:
        return FromCall(rebuild, context, kind.__name__, items)
    return FromCall(torch_compat.with_children, spec, kind.__name__, items)


def _size(items: Sequence[int], _: object) -> torch.Size:
    return torch.Size(items)


def _number(items: Sequence[torch.Tensor], _: object) -> object:
    return items[0].item()


def _packed_leaf(leaf: ResultLeaf, weight_at: dict[int, int]) -> Packed:
    match leaf:
        case FromGraph(index, number=True):
            return FromCall(_number, None, "number", (FromOutput(index),))
        case FromGraph(index):
            return FromOutput(index)
        case FromArgument(index):
            return FromLeaf(index)
        case FromWeight(tensor):
            return FromWeights(weight_at[id(tensor)])
        case Fixed(value):
            return FromConst(value)
