"""From a model to one graph. In: a callable and example arguments. Out: a `Capture`: the graph, where each of its inputs comes from, and how its outputs make the result.

The model is traced once by Dynamo and never run on data; its weights and its state are left as they were.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.fx
from torch.utils import _pytree as pytree

from piecework.codegen.entry_plan import Parameter
from piecework.errors import CaptureError, PieceworkError
from piecework.runtime import torch_compat
from piecework.runtime.arguments import parameters_of
from piecework.runtime.assumptions import Assumptions
from piecework.runtime.capture_errors import capture_error, own_error
from piecework.runtime.capture_inputs import (
    Argument,
    GraphInput,
    Size,
    Weight,
    dynamic_wish,
    leaf_names,
    leaf_sources,
    rename,
    require_dynamic,
    require_traceable,
    trace_back,
)
from piecework.runtime.capture_results import (
    Fixed,
    FromArgument,
    FromGraph,
    FromWeight,
    ResultLeaf,
    result_leaf,
    sizes_from_graph,
    stand_ins,
)
from piecework.runtime.capture_state import HINT, Snapshot, refuse_writes
from piecework.runtime.counters import counters
from piecework.runtime.dynamic_dims import set_mark, unmarked_afterwards
from piecework.runtime.facts import facts_of
from piecework.runtime.held import modules_of, tensors_of
from piecework.runtime.weights import BoundWeights, Found

__all__ = [
    "Argument",
    "Capture",
    "Fixed",
    "FromArgument",
    "FromGraph",
    "FromWeight",
    "GraphInput",
    "ResultLeaf",
    "Size",
    "Weight",
    "capture",
]

GraphCompiler = Callable[[torch.fx.GraphModule, tuple[GraphInput, ...]], None]


@dataclass(slots=True)
class Capture:
    """One captured graph.

    Attributes:
        graph: flat placeholders (named after weights, parameters and sizes) and a flat tuple of outputs.
        inputs: where each placeholder comes from, in order.
        parameters: the model's parameters, each with what the trace assumed of its argument.
        assumptions: the symbols and guards behind them.
        weights: where the model keeps the tensors that the graph reads, and those that the model returns.
        out_spec: structure of the result.
        result: where each leaf of the result comes from.
    """

    graph: torch.fx.GraphModule
    inputs: tuple[GraphInput, ...]
    parameters: tuple[Parameter, ...]
    assumptions: Assumptions
    weights: BoundWeights
    out_spec: pytree.TreeSpec
    result: tuple[ResultLeaf, ...]


@dataclass(slots=True)
class _Trace:
    """What the backend saw while Dynamo traced."""

    graph: torch.fx.GraphModule | None = None
    inputs: tuple[GraphInput, ...] = ()
    places: list[tuple[str, str]] = field(default_factory=list)
    standing_in: list[object] = field(default_factory=list)


def capture(
    model: Callable[..., object],
    args: Sequence[object],
    kwargs: Mapping[str, object],
    compile_graph: GraphCompiler,
    *,
    dynamic: bool | None = None,
    any_batch: bool = False,
) -> Capture:
    """Trace ``model`` and hand its graph to ``compile_graph`` while Dynamo's tracing context is open.

    Args:
        model: a module or function; weights are the tensors that it holds.
        args, kwargs: example arguments; any pytree of tensors, numbers and None.
        compile_graph: called once with the graph and where its inputs come from.
        dynamic: which dimensions become symbols: None takes all dimensions of the tensor arguments unless some are
            marked (``torch._dynamo.mark_dynamic``, ``mark_unbacked``, ``mark_static``), then only those.
        any_batch: if nothing is marked, trace the first dimension of each tensor for every size, 0 and 1 included; where
            the model's own code depends on it, trace as without this.

    Raises:
        CaptureError: a graph break, no tensor operation, no dynamic dimension, state that the forward changes in Python,
            an error of the model's own, or an input or output that cannot be traced back.
    """
    _require_fitting(model, args, kwargs)
    leaves = pytree.tree_leaves((tuple(args), dict(kwargs)))
    if any_batch and dynamic is None and dynamic_wish(leaves, None):
        tensors = [leaf for leaf in leaves if type(leaf) is torch.Tensor and leaf.dim()]
        with unmarked_afterwards(tensors):
            for tensor in tensors:
                set_mark(tensor, 0, unbacked=True)
            try:
                return _capture_once(model, args, kwargs, compile_graph, True)
            except PieceworkError as error:
                if not torch_compat.data_dependent(error):
                    raise
    return _capture_once(model, args, kwargs, compile_graph, dynamic)


def _capture_once(
    model: Callable[..., object],
    args: Sequence[object],
    kwargs: Mapping[str, object],
    compile_graph: GraphCompiler,
    dynamic: bool | None,
) -> Capture:
    leaves = pytree.tree_leaves((tuple(args), dict(kwargs)))
    names = leaf_names(model, args, kwargs)
    sources = {source: i for i, source in enumerate(leaf_sources(args, kwargs))}
    held = tensors_of(model)
    trace = _Trace()

    def backend(gm: torch.fx.GraphModule, example_inputs: list[object]) -> Callable[..., object]:
        trace.graph = gm
        trace.places = torch_compat.guarded_places()
        refuse_writes(gm, example_inputs, _argument_names(model, args, kwargs))
        trace.inputs = trace_back(gm, example_inputs, leaves, names, sources, held)
        rename(gm, trace.inputs)
        require_dynamic(gm, leaves)
        compile_graph(gm, trace.inputs)
        trace.standing_in = stand_ins(gm)
        return _returning(trace.standing_in)

    before = Snapshot([*modules_of(model), ("args", list(args)), ("kwargs", dict(kwargs))])
    weights = [tensor for _, tensor in held.values()]
    wish = dynamic_wish(leaves, dynamic)
    try:
        with unmarked_afterwards(weights):
            for (
                weight
            ) in weights:  # Dynamo takes those of a module that it saw changed for arguments
                torch._dynamo.mark_static(weight)
            result = _run_dynamo(model, args, kwargs, backend, wish)
    finally:
        changed = before.restore()
    if trace.graph is None:
        raise CaptureError(
            "the model has no tensor operation to capture", hint="call it with tensor arguments"
        )
    if changed is not None:
        raise CaptureError(
            "forward changes Python state, which a captured graph would not do",
            where=changed,
            hint=HINT,
        )
    counters.num_graphs_seen += 1
    result_leaves, out_spec = pytree.tree_flatten(result)
    assumptions = _assumptions(trace, leaves, names)
    results = tuple(result_leaf(leaf, trace.standing_in, leaves, held) for leaf in result_leaves)
    found = _found(trace.inputs, results, held)
    facts = facts_of(model, trace.places)
    return Capture(
        graph=trace.graph,
        inputs=trace.inputs,
        parameters=parameters_of(model, args, kwargs, assumptions.assume),
        assumptions=assumptions,
        weights=BoundWeights.of(model, modules_of(model), found, facts),
        out_spec=out_spec,
        result=results,
    )


def _argument_names(
    model: Callable[..., object], args: Sequence[object], kwargs: Mapping[str, object]
) -> dict[str, str]:
    """Dynamo's names of whole arguments → the model's."""
    whole = leaf_names(model, [None] * len(args), dict.fromkeys(kwargs))
    return dict(zip(leaf_sources([None] * len(args), dict.fromkeys(kwargs)), whole, strict=True))


def _require_fitting(
    model: Callable[..., object], args: Sequence[object], kwargs: Mapping[str, object]
) -> None:
    """Raise if the example arguments don't fit the model's signature, or hold something that can't be traced."""
    function = model.forward if isinstance(model, torch.nn.Module) else model
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a callable written in C may have none to read
        signature = None
    if signature is not None:
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            raise CaptureError(
                f"the example arguments don't fit the model: {error}",
                where=f"signature {signature}",
                hint="pass what the model's forward takes",
            ) from error
    require_traceable(model, args, kwargs)


def _found(
    inputs: Sequence[GraphInput],
    results: Sequence[ResultLeaf],
    held: Mapping[int, tuple[str, torch.Tensor]],
) -> list[Found]:
    """The weights that the graph reads, then those that are only returned."""
    found = {
        id(each.tensor): Found(each.path, each.tensor, each.source)
        for each in inputs
        if isinstance(each, Weight)
    }
    for leaf in results:
        if isinstance(leaf, FromWeight):
            path, tensor = held[id(leaf.tensor)]
            found.setdefault(id(tensor), Found(path, tensor))
    return list(found.values())


def _run_dynamo(
    model: Callable[..., object],
    args: Sequence[object],
    kwargs: Mapping[str, object],
    backend: Callable[..., object],
    dynamic: bool | None,
) -> object:
    # Dynamo caches by code object, and puts what it compiles into the function's globals: with copies of its own, captures
    # are independent of each other, and nothing outlives them.
    code = _call_model.__code__.replace()
    entry = types.FunctionType(code, dict(_call_model.__globals__), "piecework_capture")
    lent = _Lent(backend)
    compiled = torch.compile(entry, backend=lent, fullgraph=True, dynamic=dynamic)
    settings = {
        # What Dynamo remembers of sizes that other captures had must not decide which dimensions of this one are dynamic.
        "automatic_dynamic_shapes": False,
        "specialize_float": True,
        **torch_compat.no_replay(),
    }
    try:
        with torch.no_grad(), torch._dynamo.config.patch(settings):
            return compiled(model, *args, **kwargs)
    except Exception as error:
        own = own_error(error)
        if own is not None:
            raise own from own.__cause__ or error
        inner = torch_compat.backend_failure(error)
        if inner is not None:
            raise inner from None
        raise capture_error(error) from error
    finally:
        lent.give_back()


def _returning(values: list[object]) -> Callable[..., object]:
    """A function that returns ``values``; it holds nothing else, since Dynamo keeps it for a while."""
    return lambda *_: list(values)


class _Lent:
    """A backend for one call: torch keeps every backend that it was ever given, and must not keep a model with it."""

    def __init__(self, backend: Callable[..., object]) -> None:
        self._backend: Callable[..., object] | None = backend

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: list[object]) -> object:
        assert self._backend is not None
        return self._backend(gm, example_inputs)

    def give_back(self) -> None:
        self._backend = None


def _call_model(model, *args, **kwargs):  # type: ignore[no-untyped-def]
    return sizes_from_graph(model(*args, **kwargs))


def _assumptions(trace: _Trace, leaves: Sequence[object], names: Sequence[str]) -> Assumptions:
    assert trace.graph is not None
    placeholders = trace.graph.graph.find_nodes(op="placeholder")
    fakes: dict[int, object] = {}
    wished: dict[str, str] = {}
    for node, source in zip(placeholders, trace.inputs, strict=True):
        value = node.meta["example_value"]
        if isinstance(source, Argument):
            fakes[source.leaf] = value
        symbol = torch_compat.symbol_of(value)
        if isinstance(source, Size) and symbol is not None:
            wished[symbol] = source.name
    return Assumptions(fakes, wished, leaves, names)
