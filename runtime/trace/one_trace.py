"""One trace. In: a callable, example arguments, and what to do with its graph. Out: a `Capture`: the graph, where each of its inputs comes from, and how its outputs make the result.

The model is traced by Dynamo and never run on data; its weights and its state are left as they were.
"""

from __future__ import annotations

import contextlib
import logging
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
import torch.fx
from torch.utils import _pytree as pytree

from piecework.codegen.entry.plan import Parameter
from piecework.errors import CaptureError
from piecework.runtime import torch_compat
from piecework.runtime.analysis.as_eager import as_eager
from piecework.runtime.bind.asked import asks_strides
from piecework.runtime.bind.places import readable, traced
from piecework.runtime.bind.reachable import modules_of, tensors_of
from piecework.runtime.bind.traced_state import TracedState, TraceGuards
from piecework.runtime.bind.unguarded import refuse_function_names
from piecework.runtime.bind.weights import BoundWeights, Weight
from piecework.runtime.counters import counters
from piecework.runtime.regions.marks import Marks
from piecework.runtime.trace.arguments import parameters_of
from piecework.runtime.trace.assumptions import Assumptions
from piecework.runtime.trace.dynamic_dims import unmarked_afterwards
from piecework.runtime.trace.errors import capture_error, own_error
from piecework.runtime.trace.inputs import (
    Argument,
    GraphInput,
    Size,
    UnreachableInput,
    leaf_names,
    leaf_sources,
    rename,
    trace_back,
)
from piecework.runtime.trace.results import (
    FromAttribute,
    FromWeight,
    ResultLeaf,
    let_dynamo_ask,
    opened,
    refuse_kept,
    result_leaf,
    sizes_from_graph,
    stand_ins,
)
from piecework.runtime.trace.shared import RepeatedLayers, SharedLayers
from piecework.runtime.trace.side_effects import HINT, Snapshot, Unsettled, refuse_writes
from piecework.runtime.trace.untold import (
    PLACE_IN_AUTOGRAD,
    OrderOfSets,
    refuse_globals,
    refuse_offsets,
    refuse_place_in_autograd,
    refuse_views,
)

GraphCompiler = Callable[[torch.fx.GraphModule, tuple[GraphInput, ...]], None]
Check = Callable[[torch.fx.GraphModule, Mapping[int, object]], None]
"""Raises if a graph with these fake arguments won't do."""

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Capture:
    """One captured graph.

    Attributes:
        traced: gives the graph.
        inputs: where each placeholder comes from, in order.
        parameters: the model's parameters, each with what the trace assumed of its argument.
        assumptions: the symbols and guards behind them.
        weights: where the model keeps the tensors that the graph reads, and those that the model returns.
        out_spec: structure of the result.
        result: where each leaf of the result comes from; nothing once other weights are bound.
        weights_given: flattened arguments that were tensors of the model.
    """

    traced: Callable[[], torch.fx.GraphModule]
    inputs: tuple[GraphInput, ...]
    parameters: tuple[Parameter, ...]
    assumptions: Assumptions
    weights: BoundWeights
    out_spec: pytree.TreeSpec
    result: tuple[ResultLeaf, ...]
    weights_given: frozenset[int] = frozenset()

    @property
    def graph(self) -> torch.fx.GraphModule:
        """Flat placeholders (named after weights, parameters and sizes) and a flat tuple of outputs."""
        return self.traced()

    def with_weights(self, weights: BoundWeights) -> Capture:
        """The same with another binding; nothing of it holds a tensor of the old one."""
        now = {w.path: t for w, t in zip(weights.traced, weights.tensors, strict=True)}
        inputs = tuple(
            replace(each, tensor=now[each.path]) if isinstance(each, Weight) else each
            for each in self.inputs
        )
        return replace(self, weights=weights, inputs=inputs, result=())


@dataclass(slots=True)
class _Trace:
    """What the backend saw while Dynamo traced."""

    graph: torch.fx.GraphModule | None = None
    inputs: tuple[GraphInput, ...] = ()
    fakes: dict[int, object] = field(default_factory=dict)
    asks_grad: bool = True
    asks_strides: bool = True
    standing_in: list[object] = field(default_factory=list)
    order_of_sets: OrderOfSets | None = None


@dataclass(frozen=True, slots=True)
class Tracer:
    """Makes traces of one model.

    Attributes:
        model: a module or function; weights are the tensors that it holds.
        compile_graph: called with a trace's graph and where its inputs come from, while Dynamo's tracing context is open.
        layers: which layers may share one trace.
    """

    model: Callable[..., object]
    compile_graph: GraphCompiler
    layers: RepeatedLayers

    def once(
        self,
        args: Sequence[object],
        kwargs: Mapping[str, object],
        dynamic: bool | None,
        check: Check | None = None,
        *,
        settle: bool = False,
    ) -> Capture:
        """Trace once: with one trace for layers that are alike, where that can be shown to be right, and after what a first call sets."""

        def once() -> Capture:
            while True:
                marks = self.layers.marks(self.model)
                traced = partial(self._trace, args, kwargs, dynamic, check, marks)
                try:
                    return traced({})
                except UnreachableInput:  # then it is a constant like any other that the trace read
                    return traced({"specialize_int": True})
                except Exception as error:
                    if marks is None or not self.layers.gave_up(marks, error):
                        raise

        try:
            return once()
        except Unsettled as error:
            if not settle:
                raise error.refusal() from None
            put_back = error.settle()
            _log.info("set as a first call does, and traced again: %s", error)
        try:
            return once()
        except BaseException as error:
            put_back()
            if isinstance(error, Unsettled):
                raise error.refusal() from None
            raise

    def _trace(
        self,
        args: Sequence[object],
        kwargs: Mapping[str, object],
        dynamic: bool | None,
        check: Check | None,
        marks: Marks | None,
        settings: Mapping[str, object],
    ) -> Capture:
        model = self.model
        leaves = pytree.tree_leaves((tuple(args), dict(kwargs)))
        names = leaf_names(model, args, kwargs)
        sources = {source: i for i, source in enumerate(leaf_sources(args, kwargs))}
        held = tensors_of(model)
        trace = _Trace()
        shared = None if marks is None else SharedLayers(model, marks)

        def run(traced: types.FunctionType) -> tuple[object, TracedState]:
            # Dynamo caches by code object, and puts what it compiles into the function's globals: with copies of its own, captures
            # are independent of each other, and nothing outlives them.
            code = traced.__code__.replace()
            function = types.FunctionType(code, dict(traced.__globals__), "piecework_capture")
            guards = TraceGuards(model, args, kwargs, function.__globals__, shared)
            called = partial(backend, guards)
            try:
                with contextlib.nullcontext() if marks is None else marks.put_on():
                    result = _run_dynamo(
                        function, (model, *args), kwargs, called, guards, dynamic, settings
                    )
                return result, guards.state(code, _argument_names(model, args, kwargs))
            finally:
                guards.give_back()

        def backend(
            guards: TraceGuards, gm: torch.fx.GraphModule, example_inputs: list[object]
        ) -> Callable[..., object]:
            guards.look_inside()
            if shared is not None:
                gm, example_inputs = shared.write_out(
                    gm, example_inputs, guards.reader, guards.values()
                )
            as_eager(gm.graph)
            trace.graph = gm
            refuse_writes(gm, example_inputs, _argument_names(model, args, kwargs))
            trace.inputs = trace_back(gm, example_inputs, leaves, names, sources, held)
            trace.fakes = _fakes(leaves, sources)
            trace.asks_grad = bool(torch_compat.trace_names("requires_grad", *PLACE_IN_AUTOGRAD))
            trace.asks_strides = asks_strides(torch_compat.traced_code())
            refuse_place_in_autograd(leaves, names)
            refuse_views()
            refuse_offsets(leaves, names)
            refuse_function_names(torch_compat.traced_code())
            refuse_globals(model, leaves, names)
            numbers_of(leaves, trace.fakes)  # the trace must serve its own example
            if check is not None:
                check(gm, trace.fakes)
            trace.order_of_sets = OrderOfSets.of(gm, trace.inputs, leaves)
            rename(gm, trace.inputs)
            self.compile_graph(gm, trace.inputs)
            trace.standing_in = stand_ins(gm)
            return _returning(trace.standing_in)

        before = Snapshot([*modules_of(model), ("args", list(args)), ("kwargs", dict(kwargs))])
        weights = [tensor for _, tensor in held.values()]
        try:
            with unmarked_afterwards(weights):
                for weight in weights:
                    # Dynamo takes those of a module that it saw changed for arguments.
                    torch._dynamo.mark_static(weight)
                result, state = run(_call_model)
                if trace.graph is None:
                    result, state = run(_call_idle)
                    result = result[0]  # type: ignore[index]
        finally:
            changed = before.restore()
        graph = trace.graph
        assert graph is not None
        if changed is not None:
            raise CaptureError(
                "forward changes Python state, which a captured graph would not do",
                where=changed,
                hint=HINT,
            )
        if shared is not None:
            self.layers.note(shared)
        counters.num_graphs_seen += 1
        tree, made = opened(result)
        del result
        refuse_kept(made)
        result_leaves, out_spec = pytree.tree_flatten(tree)
        assumptions = _assumptions(trace, leaves, names)
        results = tuple(
            result_leaf(leaf, trace.standing_in, leaves, held) for leaf in result_leaves
        )
        if trace.order_of_sets is not None:
            call = partial(model, *args, **kwargs)
            try:
                trace.order_of_sets.require_pythons(call, out_spec, results, leaves)
            finally:
                before.restore()
        found = _found(trace.inputs, results, held)
        found += _only_looked_at(model, state, {id(each.tensor) for each in found}, held)
        own = held.keys() | {id(tensor) for _, tensor in state.tensors}
        state.tensors.clear()  # who rebinds replaces them
        return Capture(
            traced=lambda: graph,
            inputs=trace.inputs,
            parameters=parameters_of(model, args, kwargs, assumptions.assume),
            assumptions=assumptions,
            weights=BoundWeights.of(model, modules_of(model), found, state),
            out_spec=out_spec,
            result=results,
            weights_given=frozenset(i for i, leaf in enumerate(leaves) if id(leaf) in own),
        )


def _argument_names(
    model: Callable[..., object], args: Sequence[object], kwargs: Mapping[str, object]
) -> dict[str, str]:
    """Dynamo's names of whole arguments → the model's."""
    whole = leaf_names(model, [None] * len(args), dict.fromkeys(kwargs))
    return dict(zip(leaf_sources([None] * len(args), dict.fromkeys(kwargs)), whole, strict=True))


def _found(
    inputs: Sequence[GraphInput],
    results: Sequence[ResultLeaf],
    held: Mapping[int, tuple[str, torch.Tensor]],
) -> list[Weight]:
    """The weights that the graph reads, then those that are only returned."""
    found = {id(each.tensor): each for each in inputs if isinstance(each, Weight)}
    for leaf in results:
        leaf = leaf.of if isinstance(leaf, FromAttribute) else leaf
        if isinstance(leaf, FromWeight):
            path, tensor = held[id(leaf.tensor)]
            found.setdefault(id(tensor), Weight(path, tensor))
    return list(found.values())


def _only_looked_at(
    model: Callable[..., object],
    state: TracedState,
    known: set[int],
    held: Mapping[int, tuple[str, torch.Tensor]],
) -> list[Weight]:
    """Tensors of the model that the trace saw and the graph does not read: their shape may be in it."""
    found: dict[int, Weight] = {}
    for place, tensor in state.tensors:
        if id(tensor) in known:
            continue
        way = traced(place.name, model)
        if id(tensor) in held or (way is not None and way.tensor() is tensor):
            path = held.get(id(tensor), (readable(place.name), tensor))[0]
            found.setdefault(id(tensor), Weight(path, tensor, place.name))
        else:
            state.watch_tensor(place, tensor)
    return list(found.values())


def _run_dynamo(
    function: types.FunctionType,
    args: Sequence[object],
    kwargs: Mapping[str, object],
    backend: Callable[..., object],
    guards: TraceGuards,
    dynamic: bool | None,
    extra: Mapping[str, object],
) -> object:
    lent = _Lent(backend)
    compiled = torch.compile(
        function,
        backend=lent,
        fullgraph=True,
        dynamic=dynamic,
        options={"guard_filter_fn": guards.reader.choose},
    )
    settings = {
        # What Dynamo remembers of sizes that other captures had must not decide which dimensions of this one are dynamic.
        "automatic_dynamic_shapes": False,
        "specialize_float": True,
        # An argument may be a parameter; weights are marked one by one.
        "force_parameter_static_shapes": False,
        "replay_side_effects": False,  # a traced call leaves the user's objects alone
        "allow_rnn": True,  # a recurrent layer is one call
        **torch_compat.guard_settings(),
        **extra,
    }
    own_symbols = torch_compat.own_symbol_per_dimension()
    torch_compat.forget_imports()
    let_dynamo_ask()
    try:
        with torch.no_grad(), torch._dynamo.config.patch(settings), own_symbols:
            return torch_compat.in_default_stance(lambda: compiled(*args, **kwargs))
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


def _call_idle(model, *args, **kwargs):  # type: ignore[no-untyped-def]
    """The same with an operator that nobody needs: Dynamo asks no backend about a model that computes nothing."""
    return sizes_from_graph(model(*args, **kwargs)), torch.zeros(())


def _fakes(leaves: Sequence[object], sources: Mapping[str, int]) -> dict[int, object]:
    """What stands for each flattened argument in the trace that is running, whether the graph reads it or not."""
    found = {
        sources[name]: value
        for name, value in torch_compat.traced_inputs().items()
        if name in sources
    }
    by_id = {id(leaves[i]): value for i, value in found.items()}
    for index, leaf in enumerate(leaves):  # an argument that is passed twice is traced once
        if isinstance(leaf, torch.Tensor) and id(leaf) in by_id:
            found.setdefault(index, by_id[id(leaf)])
    return found


def _assumptions(trace: _Trace, leaves: Sequence[object], names: Sequence[str]) -> Assumptions:
    assert trace.graph is not None
    placeholders = trace.graph.graph.find_nodes(op="placeholder")
    fakes = dict(trace.fakes)
    wished: dict[str, str] = {}
    for node, source in zip(placeholders, trace.inputs, strict=True):
        value = node.meta["example_value"]
        if isinstance(source, Argument):
            fakes[source.leaf] = value
        symbol = torch_compat.symbol_of(value)
        if isinstance(source, Size) and symbol is not None:
            wished[symbol] = source.name
    return Assumptions(fakes, wished, leaves, names, trace.asks_grad, trace.asks_strides)


def numbers_of(leaves: Sequence[object], fakes: Mapping[int, object]) -> dict[str, int]:
    """The number that arguments have for each symbol of a trace.

    Raises:
        CaptureError: they have two for one: the trace took sizes as equal that differ, and could not serve these arguments.
    """
    numbers: dict[str, int] = {}
    for index, fake in fakes.items():
        leaf = leaves[index]
        if not (isinstance(fake, torch.Tensor) and isinstance(leaf, torch.Tensor)):
            continue
        pairs = zip(map(torch_compat.symbol_of, fake.shape), leaf.shape, strict=True)
        for symbol, size in pairs:
            if symbol is not None and numbers.setdefault(symbol, size) != size:
                raise CaptureError(
                    f"the model takes sizes {numbers[symbol]} and {size} of its arguments as equal",
                    hint="call the model itself with these arguments: it has to run with them",
                )
    return numbers
