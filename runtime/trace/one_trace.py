"""One trace: an `OpenTrace`, whose graph is to be compiled, and then a `ModelTrace`.

The model is never run on data; its weights and its state are left as they were.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial

import torch
import torch.fx
from torch.utils import _pytree as pytree

from piecework.codegen.entry.plan import Parameter
from piecework.errors import CaptureError
from piecework.runtime import torch_compat
from piecework.runtime.counters import counters
from piecework.runtime.trace.assumptions import Assumptions, parameters_of
from piecework.runtime.trace.dynamic_dims import marks_on, unmarked_afterwards
from piecework.runtime.trace.errors import capture_error, own_error, refuse_writes
from piecework.runtime.trace.inputs import (
    Argument,
    Example,
    GraphInput,
    Size,
    UnreachableInput,
    refuse_texts_of_numbers,
    rename,
    trace_back,
)
from piecework.runtime.trace.layers import RepeatedLayers
from piecework.runtime.trace.results import (
    ResultLeaf,
    let_dynamo_ask,
    opened,
    refuse_kept,
    result_leaf,
    sizes_from_graph,
    stand_ins,
)
from piecework.runtime.trace.sizes import Attempt
from piecework.runtime.watch.guards import TraceGuards, says
from piecework.runtime.watch.places import place_text
from piecework.runtime.watch.reachable import modules_of
from piecework.runtime.watch.state import TracedState
from piecework.runtime.watch.weights import BoundWeights, Weight

#: What a tensor answers otherwise where it records gradients.
_IN_AUTOGRAD = ("is_leaf", "grad_fn", "retains_grad", "_grad_fn", "_backward_hooks")


@dataclass(slots=True)
class ModelTrace:
    """What one trace of a model gave."""

    # flat placeholders (named after weights, parameters and sizes) and a flat tuple of outputs
    graph: torch.fx.GraphModule
    inputs: tuple[GraphInput, ...]  # where each placeholder comes from, in order
    # the model's parameters, each with what the trace assumed of its argument
    parameters: tuple[Parameter, ...]
    assumptions: Assumptions  # the symbols and guards behind them
    # where the model keeps the tensors that the graph reads, and those that the model returns
    weights: BoundWeights
    out_spec: pytree.TreeSpec  # structure of the result
    # where each leaf of the result comes from
    result: tuple[ResultLeaf, ...]
    # flattened arguments that were tensors of the model
    weights_given: frozenset[int] = frozenset()


def trace_once(
    model: Callable[..., object],
    args: Sequence[object],
    kwargs: Mapping[str, object],
    attempt: Attempt,
    layers: RepeatedLayers,
) -> OpenTrace:
    """Run Dynamo on ``model`` in one way; layers that are alike once, where torch lets that be."""
    dynamic, marks = attempt
    given = Example(model, args, kwargs), dynamic, layers
    with marks_on(marks):
        while True:
            try:
                try:
                    return OpenTrace(*given)
                except UnreachableInput:  # then it is a constant like any other that the trace read
                    return OpenTrace(*given, specialize_int=True)
            except Exception as error:
                if not layers.gave_up(error):
                    raise


class OpenTrace:
    """One run of Dynamo, until its graph is compiled: compilers may still decide on sizes."""

    # flat placeholders (named after weights, parameters and sizes) and a flat tuple of outputs
    graph: torch.fx.GraphModule
    inputs: tuple[GraphInput, ...]  # where each placeholder comes from

    def __init__(
        self, example: Example, dynamic: bool | None, layers: RepeatedLayers, **settings: object
    ) -> None:
        self._example, self._dynamic, self._layers = example, dynamic, layers
        self._settings = settings
        self._fakes: dict[int, object] = {}  # what stands for each flattened argument
        self._standing_in: list[object] = []
        held = (tensor for _, tensor in example.held.values())
        weights = [each for each in held if not torch.nn.parameter.is_lazy(each)]
        with unmarked_afterwards(weights):
            for weight in weights:
                # Dynamo takes those of a module that it saw changed for arguments.
                torch._dynamo.mark_static(weight)
            result, self._state = self._run(_call_model)
            if not hasattr(self, "graph"):
                result, self._state = self._run(_call_idle)
                result = result[0]  # type: ignore[index]
        counters.num_graphs_seen += 1
        tree, made = opened(result)
        del result
        refuse_kept(made)
        leaves, self._out_spec = pytree.tree_flatten(tree)
        known = self._standing_in, example.leaves, example.held
        self._results = tuple(result_leaf(leaf, *known) for leaf in leaves)

    def compiling(self) -> AbstractContextManager[None]:
        return self._context.opened()

    def weights(self) -> dict[str, Weight]:
        """Placeholder → the weight that it is."""
        placeholders = self.graph.graph.find_nodes(op="placeholder")
        pairs = zip(placeholders, self.inputs, strict=True)
        return {node.name: source for node, source in pairs if isinstance(source, Weight)}

    def _run(self, traced: types.FunctionType) -> tuple[object, TracedState]:
        """The result of the traced call, and what it rests on."""
        # Dynamo caches by code object, and puts what it compiles into the function's globals: with
        # copies of its own, traces are independent of each other, and nothing outlives them.
        code = traced.__code__.replace()
        function = types.FunctionType(code, dict(traced.__globals__), "piecework_capture")
        model, args, kwargs = self._example.call
        guards = TraceGuards(model, args, kwargs, function.__globals__)
        # torch keeps every backend that it was ever given, and must not keep a model with it
        lent = [partial(self._backend, guards)]
        compiled = torch.compile(
            function,
            backend=lambda gm, example_inputs: lent[0](gm, example_inputs),
            fullgraph=True,
            dynamic=self._dynamic,
            options={"guard_filter_fn": guards.reader.choose},
        )
        settings = {
            # What Dynamo remembers of other traces must not decide which sizes are dynamic.
            "automatic_dynamic_shapes": False,
            "specialize_float": True,
            # An argument may be a parameter; weights are marked one by one.
            "force_parameter_static_shapes": False,
            "replay_side_effects": False,  # a traced call leaves the user's objects alone
            "allow_rnn": True,  # a recurrent layer is one call
            **torch_compat.guard_settings(),
            **torch_compat.region_settings(),
            **self._settings,
        }
        torch_compat.forget_imports()
        let_dynamo_ask()
        try:
            with ExitStack() as stack:
                for each in (
                    self._layers.marked(model),
                    torch.no_grad(),
                    torch_compat.own_symbol_per_dimension(),
                    torch._dynamo.config.patch(settings),
                ):
                    stack.enter_context(each)
                result = torch_compat.in_default_stance(partial(compiled, model, *args, **kwargs))
            return result, guards.state(code, self._example.whole)
        except Exception as error:
            own = own_error(error)
            if own is not None:
                raise own from own.__cause__ or error
            inner = torch_compat.backend_failure(error)
            if inner is not None:
                raise inner from None
            raise capture_error(error) from error
        finally:
            lent.clear()
            guards.give_back()

    def _backend(
        self, guards: TraceGuards, gm: torch.fx.GraphModule, example_inputs: list[object]
    ) -> Callable[..., object]:
        """Note where the graph's inputs come from, and refuse what it would do otherwise."""
        guards.look_inside()
        gm = self.graph = self._layers.write_out(gm)
        example, code = self._example, torch_compat.traced_code()
        refuse_writes(gm, example_inputs, example.whole)
        self.inputs = trace_back(gm, example_inputs, example, guards.place_of)
        self._fakes = _fakes(example)
        if "specialize_int" not in self._settings and int in map(type, example.leaves):
            refuse_texts_of_numbers(code)
        self._asks_grad = torch_compat.trace_has_name("requires_grad", *_IN_AUTOGRAD)
        self._asks_strides = says(code, "stride")
        rename(gm, self.inputs)
        self._context = torch_compat.TraceContext.running()
        self._standing_in = stand_ins(gm)
        return _returning(self._standing_in)

    def closed(self) -> ModelTrace:
        """What it gave, once its graph is compiled."""
        graph, state, example = self.graph, self._state, self._example
        placeholders = graph.graph.find_nodes(op="placeholder")
        wished: dict[str, str] = {}
        for node, source in zip(placeholders, self.inputs, strict=True):
            value = node.meta["example_value"]
            if isinstance(source, Argument):
                self._fakes[source.leaf] = value
            symbol = torch_compat.symbol_of(value)
            if isinstance(source, Size) and symbol is not None:
                wished[symbol] = source.name
        asked = self._asks_grad, self._asks_strides
        assumptions = Assumptions(self._fakes, wished, example, *asked)
        found = self._every_weight(state)
        own = example.held.keys() | {id(tensor) for _, tensor in state.tensors}
        state.tensors.clear()  # who rebinds replaces them
        return ModelTrace(
            graph=graph,
            inputs=self.inputs,
            parameters=parameters_of(*example.call, assumptions.assume),
            assumptions=assumptions,
            weights=BoundWeights.of(modules_of(example.call[0]), found, state),
            out_spec=self._out_spec,
            result=self._results,
            weights_given=frozenset(i for i, leaf in enumerate(example.leaves) if id(leaf) in own),
        )

    def _every_weight(self, state: TracedState) -> list[Weight]:
        """The weights that the graph reads, that are returned, or whose shape was looked at."""
        held = self._example.held
        found = {id(each.tensor): each for each in self.inputs if isinstance(each, Weight)}
        for leaf in self._results:
            if isinstance(leaf, torch.Tensor):
                found.setdefault(id(leaf), Weight(*held[id(leaf)]))
        for way, tensor in state.tensors:
            path, _ = held.get(id(tensor), (place_text(way), tensor))
            found.setdefault(id(tensor), Weight(path, tensor, way))
        return list(found.values())


def _returning(values: list[object]) -> Callable[..., object]:
    """A function that returns ``values`` and holds nothing else: Dynamo keeps it for a while."""
    return lambda *_: list(values)


def _call_model(model, *args, **kwargs):  # type: ignore[no-untyped-def]
    return sizes_from_graph(model(*args, **kwargs))


def _call_idle(model, *args, **kwargs):  # type: ignore[no-untyped-def]
    """With an operator that nobody needs: of a model that computes nothing no backend is asked."""
    return sizes_from_graph(model(*args, **kwargs)), torch.zeros(())


def _fakes(example: Example) -> dict[int, object]:
    """What stands for each flattened argument in the running trace, read by the graph or not."""
    numbers: dict[str, int] = {}
    traced = torch_compat.traced_inputs().items()
    found = {example.sources[name]: value for name, value in traced if name in example.sources}
    by_id = {id(example.leaves[i]): value for i, value in found.items()}
    for index, leaf in enumerate(example.leaves):
        if not isinstance(leaf, torch.Tensor):
            continue
        if (fake := by_id.get(id(leaf))) is not None:  # what is passed twice is traced once
            fake = found.setdefault(index, fake)
        for size, number in zip(getattr(fake, "shape", ()), leaf.shape, strict=fake is not None):
            symbol = torch_compat.symbol_of(size)
            if symbol is not None and numbers.setdefault(symbol, number) != number:
                why = f"the model takes sizes {numbers[symbol]} and {number} of its arguments as equal"
                hint = "call the model itself with these arguments: it has to run with them"
                raise CaptureError(why, hint=hint)
    return found
