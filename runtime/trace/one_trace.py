"""One trace: an `OpenTrace`, whose graph is to be compiled, and then a `ModelTrace`.

The model is never run on data; its weights and its state are left as they were.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.fx
from torch.utils import _pytree as pytree

from piecework.codegen.entry.plan import Parameter
from piecework.errors import CaptureError
from piecework.runtime import torch_compat
from piecework.runtime.analysis.as_eager import as_eager
from piecework.runtime.counters import counters
from piecework.runtime.trace.arguments import parameters_of
from piecework.runtime.trace.assumptions import Assumptions
from piecework.runtime.trace.dynamo import call_idle, call_model, returning, run_dynamo
from piecework.runtime.trace.inputs import (
    Argument,
    GraphInput,
    Size,
    UnreachableInput,
    leaf_names,
    leaf_sources,
    refuse_texts_of_numbers,
    rename,
    trace_back,
)
from piecework.runtime.trace.layers import RepeatedLayers
from piecework.runtime.trace.results import (
    FromWeight,
    ResultLeaf,
    opened,
    refuse_kept,
    result_leaf,
    stand_ins,
)
from piecework.runtime.trace.side_effects import refuse_writes
from piecework.runtime.trace.sizes.dynamic_dims import unmarked_afterwards
from piecework.runtime.watch.guards import TraceGuards, asks_strides
from piecework.runtime.watch.places import place_text
from piecework.runtime.watch.reachable import modules_of, tensors_of
from piecework.runtime.watch.state import TracedState
from piecework.runtime.watch.values import Places
from piecework.runtime.watch.weights import BoundWeights, Weight

#: What a tensor answers otherwise where it records gradients.
_IN_AUTOGRAD = ("is_leaf", "grad_fn", "retains_grad", "_grad_fn", "_backward_hooks")


@dataclass(slots=True)
class ModelTrace:
    """What one trace of a model gave.

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

    def with_weights(self, weights: BoundWeights) -> ModelTrace:
        """The same with another binding; nothing of it holds a tensor of the old one."""
        now = {w.path: t for w, t in zip(weights.traced, weights.tensors, strict=True)}
        inputs = tuple(
            replace(each, tensor=now[each.path]) if isinstance(each, Weight) else each
            for each in self.inputs
        )
        return replace(self, weights=weights, inputs=inputs, result=())


@dataclass(frozen=True, slots=True)
class Attempt:
    """One way to trace a model.

    Attributes:
        args, kwargs: the example call.
        dynamic: what ``torch.compile`` is told of dimensions that are not marked.
        marks: entered for the trace; puts marks on the example's dimensions.
        check: told what stood for the arguments; raises if that won't do.
    """

    args: Sequence[object]
    kwargs: Mapping[str, object]
    dynamic: bool | None
    marks: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext
    check: Callable[[Mapping[int, object]], None] | None = None


def trace_once(model: Callable[..., object], attempt: Attempt, layers: RepeatedLayers) -> OpenTrace:
    """Run Dynamo on ``model`` in one way; layers that are alike once, where torch lets that be done.

    Raises:
        Unsettled: all that the forward writes are plain attributes of modules, set to constants.
        CaptureError: a graph break, no tensor operation, state that the forward changes in Python, an error of the model's
            own, or an input or output that cannot be traced back.
    """
    with attempt.marks():
        while True:
            given = model, attempt, layers
            try:
                try:
                    made = OpenTrace(*given, {}).run()
                except UnreachableInput:  # then it is a constant like any other that the trace read
                    made = OpenTrace(*given, {"specialize_int": True}).run()
                if attempt.check is not None:
                    attempt.check(made.fakes)
                return made
            except Exception as error:
                if not layers.gave_up(error):
                    raise


class OpenTrace:
    """One run of Dynamo, until its graph is compiled: compilers may still decide on sizes.

    Attributes:
        graph: flat placeholders (named after weights, parameters and sizes) and a flat tuple of outputs.
        inputs: where each placeholder comes from.
        fakes: what stands for each flattened argument.
    """

    graph: torch.fx.GraphModule
    inputs: tuple[GraphInput, ...]

    def __init__(
        self,
        model: Callable[..., object],
        attempt: Attempt,
        layers: RepeatedLayers,
        settings: Mapping[str, object],
    ) -> None:
        args, kwargs = attempt.args, attempt.kwargs
        self._model, self._args, self._kwargs = model, args, kwargs
        self._dynamic, self._layers, self._settings = attempt.dynamic, layers, settings
        self._leaves = pytree.tree_leaves((tuple(args), dict(kwargs)))
        self._names = leaf_names(model, args, kwargs)  # what a user calls each
        # What Dynamo calls flattened arguments, and whole ones.
        self._sources = {source: i for i, source in enumerate(leaf_sources(args, kwargs))}
        nothing = ([None] * len(args), dict.fromkeys(kwargs))
        self._whole = dict(zip(leaf_sources(*nothing), leaf_names(model, *nothing), strict=True))
        self._held = tensors_of(model)
        self.fakes: dict[int, object] = {}
        self._asks_grad = self._asks_strides = True
        self._standing_in: list[object] = []

    def run(self) -> OpenTrace:
        """Run Dynamo. Raises as `trace_once`."""
        result, self._state = self._run_marked()
        counters.num_graphs_seen += 1
        tree, made = opened(result)
        del result
        refuse_kept(made)
        result_leaves, self._out_spec = pytree.tree_flatten(tree)
        self._results = tuple(
            result_leaf(leaf, self._standing_in, self._leaves, self._held) for leaf in result_leaves
        )
        return self

    def compiling(self) -> AbstractContextManager[None]:
        """The context in which its graph is compiled: Dynamo's, opened again."""
        return self._context.opened()

    def weight_paths(self) -> dict[str, str]:
        """Placeholder → path of the weight that it is."""
        placeholders = self.graph.graph.find_nodes(op="placeholder")
        pairs = zip(placeholders, self.inputs, strict=True)
        return {node.name: source.path for node, source in pairs if isinstance(source, Weight)}

    def _run_marked(self) -> tuple[object, TracedState]:
        """The result of the traced call, and what it rests on; weights are static while it runs."""
        held = (tensor for _, tensor in self._held.values())
        weights = [each for each in held if not torch.nn.parameter.is_lazy(each)]
        with unmarked_afterwards(weights):
            for weight in weights:
                # Dynamo takes those of a module that it saw changed for arguments.
                torch._dynamo.mark_static(weight)
            result, state = self._run(call_model)
            if not hasattr(self, "graph"):
                result, state = self._run(call_idle)
                result = result[0]  # type: ignore[index]
        return result, state

    def _run(self, traced: types.FunctionType) -> tuple[object, TracedState]:
        # Dynamo caches by code object, and puts what it compiles into the function's globals: with copies of its own, captures
        # are independent of each other, and nothing outlives them.
        code = traced.__code__.replace()
        function = types.FunctionType(code, dict(traced.__globals__), "piecework_capture")
        guards = TraceGuards(self._model, self._args, self._kwargs, function.__globals__)
        try:
            with self._layers.marked(self._model):
                result = run_dynamo(
                    function,
                    (self._model, *self._args),
                    self._kwargs,
                    partial(self._backend, guards),
                    guards.reader.choose,
                    self._dynamic,
                    self._settings,
                )
            return result, guards.state(code, self._whole)
        finally:
            guards.give_back()

    def _backend(
        self, guards: TraceGuards, gm: torch.fx.GraphModule, example_inputs: list[object]
    ) -> Callable[..., object]:
        guards.look_inside()
        gm = self._layers.write_out(gm)
        as_eager(gm.graph)
        self.graph = gm
        self._look(guards, gm, example_inputs)
        rename(gm, self.inputs)
        self._context = torch_compat.TraceContext.running()
        self._standing_in = stand_ins(gm)
        return returning(self._standing_in)

    def _look(
        self, guards: TraceGuards, gm: torch.fx.GraphModule, example_inputs: list[object]
    ) -> None:
        """Note where the graph's inputs come from, and refuse what it would do otherwise than the model."""
        leaves, names = self._leaves, self._names
        refuse_writes(gm, example_inputs, self._whole)
        self.inputs = trace_back(
            gm, example_inputs, leaves, names, self._sources, self._held, guards.path_of
        )
        self.fakes = _fakes(leaves, self._sources)
        if "specialize_int" not in self._settings and int in map(type, leaves):
            refuse_texts_of_numbers(torch_compat.traced_code())
        self._asks_grad = bool(torch_compat.trace_names("requires_grad", *_IN_AUTOGRAD))
        self._asks_strides = asks_strides(torch_compat.traced_code())
        numbers_of(leaves, self.fakes)  # the trace must serve its own example

    def closed(self) -> ModelTrace:
        """What it gave, once its graph is compiled."""
        graph, state, results = self.graph, self._state, self._results
        assumptions = self._assumptions(graph)
        found = self._weights(state)
        own = self._held.keys() | {id(tensor) for _, tensor in state.tensors}
        state.tensors.clear()  # who rebinds replaces them
        return ModelTrace(
            traced=lambda: graph,
            inputs=self.inputs,
            parameters=parameters_of(self._model, self._args, self._kwargs, assumptions.assume),
            assumptions=assumptions,
            weights=BoundWeights.of(self._model, modules_of(self._model), found, state),
            out_spec=self._out_spec,
            result=results,
            weights_given=frozenset(i for i, leaf in enumerate(self._leaves) if id(leaf) in own),
        )

    def _weights(self, state: TracedState) -> list[Weight]:
        """The weights that the graph reads, those that are only returned, and those that were only looked at: their shape may be in the graph."""
        found = {id(each.tensor): each for each in self.inputs if isinstance(each, Weight)}
        for leaf in self._results:
            if isinstance(leaf, FromWeight):
                found.setdefault(id(leaf.tensor), Weight(*self._held[id(leaf.tensor)]))
        for way, tensor in state.tensors:
            if id(tensor) in self._held or way:
                path = place_text(Places().of(way)) if way else ""
                path, _ = self._held.get(id(tensor), (path, tensor))
                found.setdefault(id(tensor), Weight(path, tensor, way))
        return list(found.values())

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
        return Assumptions(
            fakes, wished, self._leaves, self._names, self._asks_grad, self._asks_strides
        )


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
