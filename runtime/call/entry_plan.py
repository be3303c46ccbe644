"""Decides what the entry of a trace checks, passes and returns, and has its text emitted."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils import _pytree as pytree

from piecework.codegen.entry import plan as ep
from piecework.codegen.entry.emit import generate_entry
from piecework.codegen.graph.origin import results_of, value_of
from piecework.runtime import torch_compat
from piecework.runtime.call.entry import Entry, MadeEntry
from piecework.runtime.pieces.program import Program
from piecework.runtime.trace import results
from piecework.runtime.trace.inputs import Argument, GraphInput, Layout, Size
from piecework.runtime.trace.one_trace import ModelTrace
from piecework.runtime.trace.writes import mutations_in
from piecework.runtime.watch.weights import Weight


def made_entry(captured: ModelTrace, program: Program, as_it_is: Callable[..., object]) -> Entry:
    """The entry of a trace, bound to the weights that it found."""
    plan = _plan_entry(captured, program)
    made = MadeEntry(
        generate_entry(plan),
        _strict_weights(captured, program),
        torch_compat.autocast_state(),
        plan.binds,
        tuple(each.apart for each in plan.not_held),
    )
    return Entry(captured.inputs, captured.weights, program, as_it_is, made, lambda: plan)


def _read_and_written(
    captured: ModelTrace, program: Program
) -> tuple[list[GraphInput], list[GraphInput]]:
    """What a graph reads as tensors, and what of it pieces write."""
    placeholders = program.split_gm.graph.find_nodes(op="placeholder")
    pairs = zip(placeholders, captured.inputs, strict=True)
    tensors = {n.name: each for n, each in pairs if isinstance(value_of(n), torch.Tensor)}
    writes = mutations_in(program.split_gm, list(program.backends), {n: n for n in tensors})
    return [*tensors.values()], [tensors[n] for n in dict.fromkeys(each.path for each in writes)]


def _not_held(
    captured: ModelTrace, read: Sequence[GraphInput], written: Sequence[GraphInput]
) -> Iterator[ep.NotHeld]:
    """The arguments that could be tensors of the model, or wrongly share their memory."""
    weights = captured.weights
    plain = [n for n, each in enumerate(weights.tensors) if each.layout is torch.strided]
    numbers = {weights.traced[n].path: n for n in plain}
    for leaf in (leaf for each in captured.parameters for leaf in ep.leaves_of(each.node)):
        if not isinstance(leaf.assumption, (ep.TensorInput, ep.UnusedTensor)):
            continue
        others: tuple[int, ...] = ()
        if leaf.index not in captured.weights_given:  # else a fact says which one it has to be
            others = tuple(n for n in plain if _could_be(leaf.assumption, weights.tensors[n]))
        beside = read if leaf.index in _leaves(written) else written
        paths = [each.path for each in beside if isinstance(each, Weight)]
        is_read = leaf.index in _leaves(read)
        apart = tuple(numbers[path] for path in paths if is_read and path in numbers)
        if others or apart:
            yield ep.NotHeld(leaf.index, others, apart)


def _leaves(inputs: Sequence[GraphInput]) -> list[int]:
    return [each.leaf for each in inputs if isinstance(each, Argument)]


def _could_be(assumption: ep.TensorInput | ep.UnusedTensor, tensor: torch.Tensor) -> bool:
    """Whether a tensor of the model passes the checks of an argument."""
    sizes: Sequence[object] = ()
    rank = assumption.rank if isinstance(assumption, ep.UnusedTensor) else len(assumption.sizes)
    if isinstance(assumption, ep.TensorInput):
        sizes = assumption.sizes
        if type(tensor) is not assumption.kind:
            return False
    known = (assumption.dtype, assumption.device, rank)
    pairs = zip(tensor.shape, sizes, strict=False)
    same = (tensor.dtype, tensor.device, tensor.dim()) == known
    return same and all(now == size for now, size in pairs if isinstance(size, int))


def _plan_entry(captured: ModelTrace, program: Program) -> ep.EntryPlan:
    """Say what the entry must check, pass and return."""
    read, written = _read_and_written(captured, program)
    levers = program.config.stitching_config
    bound = {row.path for row in program.source.module.bound}
    weights = [each for each in captured.inputs if isinstance(each, Weight)]
    numbers = {each.path: number for number, each in enumerate(weights)}
    unbound = (e for e in captured.inputs if not (isinstance(e, Weight) and e.path in bound))
    weight_at = {id(tensor): number for number, tensor in enumerate(captured.weights.tensors)}
    outputs = results_of(captured.graph.graph)
    batch = None
    if program.range_table is not None and program.batch.symbol is not None:
        index, dim = program.batch.input
        match captured.inputs[index]:
            case Argument(leaf):
                batch = captured.assumptions.passed(leaf, dim)
            case Size(leaf, size_dim):
                batch = captured.assumptions.passed(leaf, size_dim)
    return ep.EntryPlan(
        banner=(f"model: {program.name}",),
        parameters=captured.parameters,
        symbols=captured.assumptions.symbols(),
        names=captured.assumptions.names(),
        guards=captured.assumptions.guards(),
        passed=tuple(_passed(each, captured, numbers) for each in unbound),
        outputs=tuple(e.name if isinstance(e, torch.fx.Node) else "unused" for e in outputs),
        result=_packed(captured.out_spec, list(captured.result), weight_at),
        batch=batch,
        apart=tuple(
            (leaf, tuple(x for x in _leaves(read) if x != leaf)) for leaf in _leaves(written)
        ),
        # A model without weights has modes of its own to watch all the same.
        binds=bool(bound) or not weights,
        held=tuple(each.path for each in captured.weights.traced),
        not_held=tuple(_not_held(captured, read, written)),
        watches_arguments=captured.weights.state.argument_check(captured.parameters) is not None,
        checks=levers.check_inputs or program.config.dynamic_shapes_config.evaluate_guards,
        asks_grad_mode=captured.weights.state.asks_grad_mode,
    )


def _passed(source: object, captured: ModelTrace, numbers: dict[str, int]) -> ep.Passed:
    """What a call gives for an input of the graph."""
    match source:
        case Weight(path):
            return ep.FromWeights(numbers[path])
        case Argument(leaf):
            return captured.assumptions.passed(leaf, None)
        case Size(leaf, dim):
            return captured.assumptions.passed(leaf, dim)
        case Layout(leaf, stride):
            return captured.assumptions.layout(leaf, stride)
    raise TypeError(type(source).__name__)


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


def _packed(
    spec: pytree.TreeSpec, leaves: list[results.ResultLeaf], weight_at: dict[int, int]
) -> ep.Packed:
    """How ``spec`` is rebuilt; takes what it needs from the front of ``leaves``."""
    if spec.is_leaf():
        leaf = leaves.pop(0)
        return ep.FromWeights(weight_at[id(leaf)]) if isinstance(leaf, torch.Tensor) else leaf
    kind, context = spec.type, spec.context
    items = tuple(_packed(child, leaves, weight_at) for child in spec.children())
    if kind in (list, tuple):
        return ep.FromItems(kind, tuple(range(len(items))), items)
    if kind is dict:
        return ep.FromItems(dict, tuple(context), items)
    if kind is torch.Size:  # which pytree would make a tuple of
        return ep.FromCall(_size, None, "Size", items)
    rebuild = pytree.SUPPORTED_NODES[kind].unflatten_fn
    return ep.FromCall(rebuild, context, kind.__name__, items)


def _size(items: Sequence[int], _: object) -> torch.Size:
    return torch.Size(items)
