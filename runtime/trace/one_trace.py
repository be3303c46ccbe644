"""One trace. In: a callable, example arguments, and what to do with its graph. Out: a `Capture`: the graph, where each of its inputs comes from, and how its outputs make the result.

The model is traced by Dynamo and never run on data; its weights and its state are left as they were.
"""

from __future__ import annotations

import contextlib
import logging
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
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
from piecework.runtime.trace.as_python import AsPython
from piecework.runtime.trace.assumptions import Assumptions
from piecework.runtime.trace.dynamo import call_idle, call_model, returning, run_dynamo
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
    opened,
    refuse_kept,
    result_leaf,
    stand_ins,
)
from piecework.runtime.trace.shared import RepeatedLayers, SharedLayers
from piecework.runtime.trace.side_effects import HINT, Snapshot, Unsettled, refuse_writes
from piecework.runtime.trace.sizes.dynamic_dims import unmarked_afterwards
from piecework.runtime.trace.untold import (
    PLACE_IN_AUTOGRAD,
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
                example = _Example.of(self.model, args, kwargs)
                traced = partial(_Trace, self, example, dynamic, check, marks)
                try:
                    return traced({}).capture()
                except UnreachableInput:  # then it is a constant like any other that the trace read
                    return traced({"specialize_int": True}).capture()
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


@dataclass(frozen=True, slots=True)
class _Example:
    """The arguments of a trace, flattened and named.

    Attributes:
        leaves, names: the flattened arguments, and what a user calls each.
        sources: what Dynamo calls a flattened argument, with its number.
        whole: Dynamo's names of whole arguments, with the model's.
        held: the model's tensors by identity, each with its path.
    """

    model: Callable[..., object]
    args: Sequence[object]
    kwargs: Mapping[str, object]
    leaves: Sequence[object]
    names: Sequence[str]
    sources: Mapping[str, int]
    whole: Mapping[str, str]
    held: Mapping[int, tuple[str, torch.Tensor]]

    @classmethod
    def of(
        cls, model: Callable[..., object], args: Sequence[object], kwargs: Mapping[str, object]
    ) -> _Example:
        nothing = ([None] * len(args), dict.fromkeys(kwargs))
        whole = zip(leaf_sources(*nothing), leaf_names(model, *nothing), strict=True)
        return cls(
            model,
            args,
            kwargs,
            pytree.tree_leaves((tuple(args), dict(kwargs))),
            leaf_names(model, args, kwargs),
            {source: i for i, source in enumerate(leaf_sources(args, kwargs))},
            dict(whole),
            tensors_of(model),
        )


class _Trace:
    """One run of Dynamo: what it is given, and what the backend saw of it."""

    def __init__(
        self,
        tracer: Tracer,
        example: _Example,
        dynamic: bool | None,
        check: Check | None,
        marks: Marks | None,
        settings: Mapping[str, object],
    ) -> None:
        self.tracer, self.example = tracer, example
        self.dynamic, self.check, self.settings = dynamic, check, settings
        self.marks = marks
        self.shared = None if marks is None else SharedLayers(example.model, marks)
        self.graph: torch.fx.GraphModule | None = None
        self.inputs: tuple[GraphInput, ...] = ()
        self.fakes: dict[int, object] = {}
        self.asks_grad = self.asks_strides = True
        self.standing_in: list[object] = []
        self.as_python: AsPython | None = None

    def capture(self) -> Capture:
        """Run Dynamo, and say what came of it.

        Raises:
            CaptureError: see `piecework.runtime.trace.tracing.capture`.
        """
        given = self.example
        state_of_python = [*modules_of(given.model), ("args", list(given.args))]
        before = Snapshot([*state_of_python, ("kwargs", dict(given.kwargs))])
        try:
            result, state = self._run_marked()
        finally:
            changed = before.restore()
        if changed is not None:
            raise CaptureError(
                "forward changes Python state, which a captured graph would not do",
                where=changed,
                hint=HINT,
            )
        if self.shared is not None:
            self.tracer.layers.note(self.shared)
        counters.num_graphs_seen += 1
        tree, made = opened(result)
        del result
        refuse_kept(made)
        result_leaves, out_spec = pytree.tree_flatten(tree)
        results = tuple(
            result_leaf(leaf, self.standing_in, given.leaves, given.held) for leaf in result_leaves
        )
        if self.as_python is not None:
            call = partial(given.model, *given.args, **given.kwargs)
            try:
                self.as_python.require(call, out_spec, results, given.leaves)
            finally:
                before.restore()
        return self._captured(state, results, out_spec)

    def _run_marked(self) -> tuple[object, TracedState]:
        """The result of the traced call, and what it rests on; weights are static while it runs."""
        weights = [tensor for _, tensor in self.example.held.values()]
        with unmarked_afterwards(weights):
            for weight in weights:
                # Dynamo takes those of a module that it saw changed for arguments.
                torch._dynamo.mark_static(weight)
            result, state = self._run(call_model)
            if self.graph is None:
                result, state = self._run(call_idle)
                result = result[0]  # type: ignore[index]
        return result, state

    def _run(self, traced: types.FunctionType) -> tuple[object, TracedState]:
        # Dynamo caches by code object, and puts what it compiles into the function's globals: with copies of its own, captures
        # are independent of each other, and nothing outlives them.
        given = self.example
        code = traced.__code__.replace()
        function = types.FunctionType(code, dict(traced.__globals__), "piecework_capture")
        guards = TraceGuards(
            given.model, given.args, given.kwargs, function.__globals__, self.shared
        )
        try:
            with contextlib.nullcontext() if self.marks is None else self.marks.put_on():
                result = run_dynamo(
                    function,
                    (given.model, *given.args),
                    given.kwargs,
                    partial(self._backend, guards),
                    guards.reader.choose,
                    self.dynamic,
                    self.settings,
                )
            return result, guards.state(code, given.whole)
        finally:
            guards.give_back()

    def _backend(
        self, guards: TraceGuards, gm: torch.fx.GraphModule, example_inputs: list[object]
    ) -> Callable[..., object]:
        guards.look_inside()
        if self.shared is not None:
            gm, example_inputs = self.shared.write_out(
                gm, example_inputs, guards.reader, guards.values()
            )
        as_eager(gm.graph)
        self.graph = gm
        self._look(gm, example_inputs)
        rename(gm, self.inputs)
        self.tracer.compile_graph(gm, self.inputs)
        self.standing_in = stand_ins(gm)
        return returning(self.standing_in)

    def _look(self, gm: torch.fx.GraphModule, example_inputs: list[object]) -> None:
        """Note where the graph's inputs come from, and refuse what it would do otherwise than the model."""
        given, leaves, names = self.example, self.example.leaves, self.example.names
        refuse_writes(gm, example_inputs, given.whole)
        self.inputs = trace_back(gm, example_inputs, leaves, names, given.sources, given.held)
        self.fakes = _fakes(leaves, given.sources)
        self.asks_grad = bool(torch_compat.trace_names("requires_grad", *PLACE_IN_AUTOGRAD))
        self.asks_strides = asks_strides(torch_compat.traced_code())
        refuse_place_in_autograd(leaves, names)
        refuse_views()
        refuse_offsets(leaves, names)
        refuse_function_names(torch_compat.traced_code())
        refuse_globals(given.model, leaves, names)
        numbers_of(leaves, self.fakes)  # the trace must serve its own example
        if self.check is not None:
            self.check(gm, self.fakes)
        served = self.shared is not None and self.shared.served
        held = [tensor for _, tensor in given.held.values()]
        self.as_python = AsPython.of(gm, self.inputs, leaves, held, served, given.model)

    def _captured(
        self, state: TracedState, results: tuple[ResultLeaf, ...], out_spec: pytree.TreeSpec
    ) -> Capture:
        given, graph = self.example, self.graph
        assert graph is not None
        assumptions = self._assumptions(graph)
        found = _found(self.inputs, results, given.held)
        known = {id(each.tensor) for each in found}
        found += _only_looked_at(given.model, state, known, given.held)
        own = given.held.keys() | {id(tensor) for _, tensor in state.tensors}
        state.tensors.clear()  # who rebinds replaces them
        return Capture(
            traced=lambda: graph,
            inputs=self.inputs,
            parameters=parameters_of(given.model, given.args, given.kwargs, assumptions.assume),
            assumptions=assumptions,
            weights=BoundWeights.of(given.model, modules_of(given.model), found, state),
            out_spec=out_spec,
            result=results,
            weights_given=frozenset(i for i, leaf in enumerate(given.leaves) if id(leaf) in own),
        )

    def _assumptions(self, graph: torch.fx.GraphModule) -> Assumptions:
        placeholders = graph.graph.find_nodes(op="placeholder")
        fakes = dict(self.fakes)
        wished: dict[str, str] = {}
        for node, source in zip(placeholders, self.inputs, strict=True):
            value = node.meta["example_value"]
            if isinstance(source, Argument):
                fakes[source.leaf] = value
            symbol = torch_compat.symbol_of(value)
            if isinstance(source, Size) and symbol is not None:
                wished[symbol] = source.name
        given = self.example
        return Assumptions(
            fakes, wished, given.leaves, given.names, self.asks_grad, self.asks_strides
        )


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
