"""The function that users call: a trace's emitted entry, bound to its program and weights.

Per call the emitted source runs, and this only where it changes or something is wrong.
"""

from __future__ import annotations

import inspect
import itertools
import logging
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import FunctionType, SimpleNamespace
from typing import TYPE_CHECKING, Protocol

import torch

from piecework.codegen.entry.source import FUNCTION_NAME, EntrySource
from piecework.codegen.stitch.bind import execute_source
from piecework.errors import InputError
from piecework.runtime import torch_compat
from piecework.runtime.call.edited import EditedSource
from piecework.runtime.pieces.program import Program
from piecework.runtime.trace.errors import OPAQUE, tell_of_gradients
from piecework.runtime.trace.inputs import GraphInput
from piecework.runtime.watch.state import ArgumentCheck
from piecework.runtime.watch.weights import BoundWeights, Weight

if TYPE_CHECKING:
    from piecework.codegen.entry.plan import EntryPlan

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MadeEntry:
    """An emitted entry before it is bound."""

    source: EntrySource  # the emitted text
    strict: frozenset[str]  # weights that every reader compares by itself, by path
    autocast: tuple[tuple[str, torch.dtype], ...]  # where autocast was on in the trace
    # what the plan says of weights; see `EntryPlan.binds` and `NotHeld.apart`
    binds: bool
    apart: tuple[tuple[int, ...], ...]


class Graphs(Protocol):
    """What serves in place of a stitching function, called like it: its static graphs."""

    def __call__(self, *flat: object, **submods: object) -> object: ...

    def still_reads(self, weights: BoundWeights) -> bool: ...

    def release(self) -> None: ...


@dataclass(frozen=True, slots=True, eq=False)
class Execution:
    """What one call runs, from its first look to its return; a change publishes another one."""

    weights: BoundWeights  # what is bound; never changed, a rebind makes another
    function: FunctionType  # the emitted stitching function, over those weights
    edited: EditedSource | None = None  # its text; None for the generated one
    graphs: Graphs | None = None  # what was captured of ``function``, and serves in its place
    # The entry for calls that can't take every shortcut, made when first needed.
    variants: dict[str, Callable[..., object]] = field(default_factory=dict)
    counter: itertools.count[int] = field(default_factory=itertools.count)  # of its calls


def by_path_of(weights: BoundWeights) -> dict[str, torch.Tensor]:
    """Weight path → tensor."""
    return {w.path: t for w, t in zip(weights.traced, weights.tensors, strict=True)}


class Entry:
    """The emitted entry, bound and ready; ``call`` takes the model's arguments.

    ``plan`` gives what the entry says, and ``inputs`` where each placeholder of the graph comes from.
    """

    def __init__(
        self,
        inputs: tuple[GraphInput, ...],
        weights: BoundWeights,
        program: Program,
        as_it_is: Callable[..., object],
        made: MadeEntry,
        plan: Callable[[], EntryPlan],
    ) -> None:
        self._program, self.as_it_is, self.inputs = program, as_it_is, inputs
        self.made, self.plan, self._state = made, plan, weights.state
        self.careful_calls: dict[str, int] = {}  # calls past every shortcut, by what made them
        self._makes_tensors: bool | None = None
        weights.trust(self.made.strict)
        self.source: EntrySource = self.made.source
        self._stances = torch_compat.stance_holder()
        self.now = self._made(weights, None, itertools.count())
        self.call = self._execute(self.now, self.now.function, program.submods_for)
        # Python names it when arguments don't fit.
        self.call.__qualname__ = f"{program.name}.forward"
        # None is known to change nothing until `_in_stance` has looked at the current one.
        self.call.__globals__.update(dynamo=self._stances, stance=None)

    @cached_property
    def _arguments(self) -> ArgumentCheck | None:
        return self._state.argument_check(self.plan().parameters)

    @property
    def uncaptured_calls(self) -> int:
        """Calls of the stitching function since anything was captured or released last."""
        # A counter says what comes next, and to ask for that would count.
        return 0 if self.now.graphs is not None else int(repr(self.now.counter)[len("count(") : -1])

    # --- changes: each publishes another execution ------------------------------------------------

    def rebound(self) -> Execution:
        """An execution with the weights that the model has now; graphs of the very same go on."""
        now = self.now
        weights = now.weights.rebound()
        same = all(map(operator.is_, weights.tensors, now.weights.tensors))
        if same and (now.graphs is None or now.graphs.still_reads(weights)):
            return replace(now, weights=weights, variants={})
        return self._made(weights, now.edited, self._counter())

    def accept_settings(self) -> None:
        """Take what the model holds in Python now for as good as what it held in the trace."""
        self.publish(replace(self.now, weights=self.now.weights.accepted(), variants={}))

    def edit(self, edited: EditedSource) -> None:
        """Run an edited text in place of the generated stitching source, and of static graphs."""
        self.publish(self._made(self.now.weights, edited, self._counter()))

    def capture(self, graphs: Graphs | None) -> None:
        """Serve calls from static graphs of `execution_fn`; None serves them by that again."""
        self.publish(replace(self.now, graphs=graphs, variants={}, counter=itertools.count()))

    def publish(self, execution: Execution) -> None:
        """Serve calls by ``execution`` from now on; those that run keep theirs."""
        before = self.now
        by_path = by_path_of(execution.weights)
        self.inputs = tuple(  # nothing holds a tensor of the old binding
            replace(each, tensor=by_path[each.path]) if isinstance(each, Weight) else each
            for each in self.inputs
        )
        self._serve_by(execution)
        if before.graphs is not None and before.graphs is not execution.graphs:
            before.graphs.release()

    @contextmanager
    def served_beside(
        self, beside: Callable[[Callable[..., object]], Callable[..., object]]
    ) -> Iterator[None]:
        """For the block, serve calls by what ``beside`` makes of the stitching function."""
        before = self.now
        self._serve_by(replace(before, variants={}), beside(before.function))
        try:
            yield
        finally:
            self._serve_by(before)

    def _serve_by(self, execution: Execution, serves: Callable[..., object] | None = None) -> None:
        self.now = execution
        if serves is None:
            serves = execution.function if execution.graphs is None else execution.graphs
        self.call.__globals__.update(self._held(execution, serves))

    def _counter(self) -> itertools.count[int]:
        """What counts the calls after a change: on from where it was, unless graphs served."""
        return itertools.count() if self.now.graphs is not None else self.now.counter

    def _made(
        self, weights: BoundWeights, edited: EditedSource | None, counter: itertools.count[int]
    ) -> Execution:
        """An execution of a text with these weights, and nothing captured of it yet."""
        by_path = by_path_of(weights)
        bound = {row.name: by_path[row.path] for row in self._program.source.module.bound}
        code = None if edited is None else edited.code
        function = self._program.bind(bound, code=code)
        return Execution(weights, function, edited, counter=counter)

    def _held(self, execution: Execution, serves: Callable[..., object]) -> dict[str, object]:
        """What emitted text finds of an execution; see `piecework.codegen.entry.emit.HELD`."""
        weights, span = execution.weights, torch_compat.memory_span
        # Weights that are passed or returned are of the same binding as those that it holds.
        fetch = weights.held if self.made.binds else weights.fetch
        return {
            "bound": (serves, weights.unchanged, fetch, execution.counter.__next__),
            "held_tensors": weights.tensors,
            "held_spans": [
                [span(weights.tensors[n]) for n in numbers] for numbers in self.made.apart
            ],
        }

    def _execute(
        self,
        execution: Execution,
        serves: Callable[..., object],
        submods_for: Callable[[int], object],
        **probes: object,
    ) -> FunctionType:
        """The emitted text, executed; ``probes`` stand in for what looks for active modes."""
        namespace: dict[str, object] = {
            **self.source.consts,
            **{name: getattr(torch_compat, name) for name in _MODES},
            "same_kernels": self._program.direct_ops.unchanged,
            "dynamo": _ONE_STANCE,
            "stance": _ONE_STANCE._stance,
            "entry_in_stance": self._in_stance,
            **self._held(execution, serves),
            "submods_for": submods_for,
            "entry_with_care": self._with_care,
            "explain_inputs": self._explain_inputs,
            "explain_weights": self._explain_weights,
            "explain_grad_mode": self._explain_grad_mode,
            "entry_without_gradients": self._without_gradients,
            "arguments_as_traced": lambda *values: self._arguments(values) is None,  # type: ignore[misc]
            "memory_apart": torch_compat.memory_apart,
            "memory_outside": torch_compat.memory_outside,
            "flatten": torch_compat.flatten_tree,
            **probes,
        }
        entry = execute_source(self.source.code, namespace, FUNCTION_NAME)
        torch_compat.keep_out_of_traces(entry, OPAQUE)
        return entry

    # --- refusals ---------------------------------------------------------------------------------

    def accepts(self, args: Sequence[object], kwargs: Mapping[str, object]) -> bool:
        """Whether the emitted check passes for these arguments."""
        check = self.call.__globals__.get("check_inputs")
        given = inspect.signature(self.call).bind(*args, **kwargs)
        given.apply_defaults()
        try:
            if check is not None:
                check(*given.arguments.values())
        except InputError:
            return False
        return True

    def _refused(self, error: InputError) -> InputError:
        """``error`` as one of a call that nothing has run for yet."""
        error.refused_by = self
        return error

    def _explain_inputs(self, *values: object) -> None:
        from piecework.runtime.call.explain import input_error

        now = self.call.__globals__
        held = {name: now[name] for name in ("held_tensors", "held_spans")}
        raise self._refused(input_error(self.plan(), values, self._arguments, **held))

    def _explain_weights(self) -> None:
        raise self._refused(self.now.weights.explain())

    def _explain_grad_mode(self) -> None:
        why = "the model's code asks whether gradients are recorded, and was traced while none were"
        hint = "call it under torch.no_grad(): a stitched model serves inference"
        raise self._refused(InputError(why, hint=hint))

    # --- calls that can't take every shortcut -----------------------------------------------------

    def _without_gradients(self, *args: object, **kwargs: object) -> object:
        """A call with gradients off; says that results carry none, if an argument asks for them."""
        for value in (*args, *kwargs.values()):
            if type(value) is not torch.Tensor or value.requires_grad:
                tell_of_gradients((*args, *kwargs.values()), self._program.config.strict)
                break
        set_grad_enabled = torch_compat.set_grad_enabled
        set_grad_enabled(False)
        try:
            return self.call(*args, **kwargs)
        finally:
            set_grad_enabled(True)

    def _in_stance(self, *args: object, **kwargs: object) -> object:
        """A call after ``torch.compiler.set_stance``: ``force_eager`` runs the model as it is."""
        stance = self._stances._stance  # type: ignore[attr-defined]
        if torch_compat.stance_name() == torch_compat.FORCE_EAGER:
            return self.as_it_is(*args, **kwargs)
        if stance is not None:
            # Dynamo's module itself is one look-up less than what stands in until it is imported.
            self._stances = torch_compat.stance_holder()
        self.call.__globals__.update(dynamo=self._stances, stance=stance)
        return self.call(*args, **kwargs)

    def _with_care(self, *args: object, **kwargs: object) -> object:
        """A call while a mode, transform or autocast is active, or an operator was overridden."""
        if torch_compat.transforms():
            why = (
                "a torch.func transform, forward-mode differentiation or torch.jit.trace is active"
            )
            hint = "transform or trace the model itself, and compile the result"
            raise self._refused(InputError(why, hint=hint))
        reason = self._why_as_it_is()
        if reason:
            if reason not in self.careful_calls:
                _log.warning("%s runs as it is, uncompiled: %s", self._program.name, reason)
            self._count(reason)
            return self.as_it_is(*args, **kwargs)
        autocast = torch_compat.autocast_state()
        if autocast != self.made.autocast:
            shown = ", ".join(f"on for {device} ({dtype})" for device, dtype in autocast) or "off"
            why = f"autocast is {shown}, and was not so when the model was traced"
            hint = "compile the model inside the same autocast context"
            raise self._refused(InputError(why, hint=hint))
        if autocast:
            self._count("autocast is on")
        now = self.now
        # torch.set_default_device is a mode for good.
        variant = "under autocast" if autocast else "under a default device"
        if variant not in now.variants:
            idle = dict.fromkeys(_MODES, lambda: False)
            serves, submods_for = self.call.__globals__["bound"][0], self._program.submods_for
            if autocast:
                serves, submods_for = self._by_public_forms(now.function)
                now = replace(now, counter=itertools.count())  # `careful_calls` counts these
            self.now.variants[variant] = self._execute(now, serves, submods_for, **idle)
        return self.now.variants[variant](*args, **kwargs)

    def _by_public_forms(
        self, function: FunctionType
    ) -> tuple[Callable[..., object], Callable[[int], object]]:
        """The stitching function over the public forms of pieces, and their lists by batch size."""
        program, names = self._program, self._program.source.submod_names
        found = [program.callables(each) for each in program.compile_ranges]
        lists = [tuple(each[name] for name in names) for each in found]

        def serves(*flat: object, __vllm_submods__: object = lists[-1]) -> object:
            return function(*flat, __vllm_submods__=__vllm_submods__)

        table = program.range_table
        return serves, lambda batch: lists[0 if table is None else table.index(batch)]

    def _why_as_it_is(self) -> str:
        """What the pieces don't know and would have to; "" if nothing."""
        if not self._program.direct_ops.unchanged():
            return "an operator was given another kernel"
        if mode := torch_compat.watching_mode():
            return f"{mode} is active"
        if not torch_compat.function_modes() or torch.get_default_device().type == "cpu":
            return ""
        # Where the trace had no default device, tensors are made on the CPU.
        if self._makes_tensors is None:
            self._makes_tensors = self._program.asks_for_default_device()
        return "a default device is set" if self._makes_tensors else ""

    def _count(self, reason: str) -> None:
        self.careful_calls[reason] = self.careful_calls.get(reason, 0) + 1


#: For texts that are reached after the stance was looked at.
_ONE_STANCE = SimpleNamespace(_stance=None)
#: The probes of a call for what may be active around it, by their names in the emitted text.
_MODES = ("autocast_enabled", "dispatch_modes", "function_modes", "transforms")
