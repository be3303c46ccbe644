"""The function that users call: a trace's emitted entry, bound to its program and weights.

Per call nothing here runs: the emitted source does, and this where it changes or something is wrong.
"""

from __future__ import annotations

import inspect
import itertools
import logging
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import FunctionType, SimpleNamespace
from typing import Protocol
from weakref import WeakKeyDictionary

import torch

from piecework.codegen.entry.emit import FUNCTION_NAME, EntrySource
from piecework.codegen.stitch.bind import execute_source
from piecework.errors import InputError
from piecework.runtime import torch_compat
from piecework.runtime.call.edited import EditedSource
from piecework.runtime.call.entry_plan import MadeEntry, made_entry
from piecework.runtime.call.explain import input_error
from piecework.runtime.pieces.program import Program
from piecework.runtime.trace.errors import OPAQUE, tell_of_gradients
from piecework.runtime.trace.one_trace import ModelTrace
from piecework.runtime.watch.weights import BoundWeights

_log = logging.getLogger(__name__)


class Graphs(Protocol):
    """What serves in place of a stitching function, called like it: its static graphs."""

    def __call__(self, *flat: object, **submods: object) -> object: ...

    def still_reads(self, weights: BoundWeights) -> bool:
        """Whether they read the memory of these weights."""
        ...

    def release(self) -> None:
        """Give everything up, once no call is in it."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Execution:
    """What a call runs, from its first look to its return: a change publishes another one, which never reaches a call half-way through."""

    weights: BoundWeights  # what is bound; never changed, a rebind makes another
    # the emitted stitching function, over those weights in a module of its own
    function: FunctionType
    # the text that ``function`` was made from; None for the generated one
    edited: EditedSource | None = None
    graphs: Graphs | None = None  # what was captured of ``function``, and serves in its place
    # the entry for calls that can't take every shortcut, made when first needed
    variants: dict[str, Callable[..., object]] = field(default_factory=dict)
    # counts the calls of the entry, from any thread
    counter: itertools.count[int] = field(default_factory=itertools.count)


def by_path_of(weights: BoundWeights) -> dict[str, torch.Tensor]:
    """Weight path → tensor."""
    return {w.path: t for w, t in zip(weights.traced, weights.tensors, strict=True)}


class Entry:
    """The emitted entry, bound and ready.

    Attributes:
        source: the emitted text of ``check_inputs`` and ``entry``.
        call: the entry: takes the model's arguments, returns the model's result.
        captured: what the trace gave.
        careful_calls: how many calls went past every shortcut, static graphs included, by what made them.
    """

    def __init__(
        self,
        captured: ModelTrace,
        program: Program,
        as_it_is: Callable[..., object],
        made: MadeEntry | None = None,
    ) -> None:
        self._program, self.as_it_is, self.captured = program, as_it_is, captured
        self.made = made_entry(captured, program) if made is None else made
        self._arguments = captured.weights.state.argument_check(captured.parameters)
        self._spans: WeakKeyDictionary[BoundWeights, list[list[tuple[int, int]]]] = (
            WeakKeyDictionary()
        )
        self.careful_calls: dict[str, int] = {}
        self._makes_tensors: bool | None = None
        captured.weights.trust(self.made.strict)
        self.source: EntrySource = self.made.source
        self._stances = torch_compat.stance_holder()
        self._now = self._made(captured.weights, None, itertools.count())
        self.call = self._execute(self._now, self._now.function, program.submods_for)
        # Python names it when arguments don't fit.
        self.call.__qualname__ = f"{program.name}.forward"
        # None is the stance that is known to change nothing until `_in_stance` has looked at the current one.
        self.call.__globals__.update(dynamo=self._stances, stance=None)

    @property
    def execution_fn(self) -> FunctionType:
        """The emitted stitching function, bound."""
        return self._now.function

    @property
    def weights(self) -> BoundWeights:
        """What is bound."""
        return self._now.weights

    @property
    def edited(self) -> EditedSource | None:
        """The edited text that runs, if one does."""
        return self._now.edited

    @property
    def graphs(self) -> Graphs | None:
        """The static graphs that serve calls."""
        return self._now.graphs

    @property
    def uncaptured_calls(self) -> int:
        """How many calls ran the stitching function since anything was captured or released last; static graphs count for themselves."""
        # A counter says what comes next, and to ask for that would count.
        return 0 if self.graphs is not None else int(repr(self._now.counter)[len("count(") : -1])

    # --- changes: each publishes another execution, and calls that run keep theirs --------------------

    def rebound(self) -> Execution:
        """An execution with the weights that the model has now; it serves once it is published.

        Static graphs go on where every weight is the very tensor that was bound, and lies where they read it.
        """
        now = self._now
        weights = now.weights.rebound()
        same = all(map(operator.is_, weights.tensors, now.weights.tensors))
        if same and (now.graphs is None or now.graphs.still_reads(weights)):
            return replace(now, weights=weights, variants={})
        return self._made(weights, now.edited, self._counter())

    def accept_settings(self) -> None:
        """Take what the model holds in Python now for as good as what it held in the trace."""
        self.publish(replace(self._now, weights=self._now.weights.accepted(), variants={}))

    def edit(self, edited: EditedSource) -> None:
        """Run an edited text in place of the generated stitching source, and of static graphs."""
        self.publish(self._made(self._now.weights, edited, self._counter()))

    def capture(self, graphs: Graphs | None) -> None:
        """Serve calls from static graphs that were captured of `execution_fn`; None serves them by that itself again."""
        self.publish(replace(self._now, graphs=graphs, variants={}, counter=itertools.count()))

    def publish(self, execution: Execution) -> None:
        """Serve calls by ``execution`` from now on, in one step; those that run keep theirs, and what is left is released."""
        before = self._now
        self.captured = self.captured.with_weights(execution.weights)  # lets go of the old ones
        self._serve_by(execution)
        if before.graphs is not None and before.graphs is not execution.graphs:
            before.graphs.release()

    @contextmanager
    def served_beside(
        self, beside: Callable[[Callable[..., object]], Callable[..., object]]
    ) -> Iterator[None]:
        """Serve calls by what ``beside`` makes of the stitching function, and by no static graph, for the block; then as before.

        Nothing may change this entry meanwhile.
        """
        before = self._now
        self._serve_by(replace(before, variants={}), beside(before.function))
        try:
            yield
        finally:
            self._serve_by(before)

    def _serve_by(self, execution: Execution, serves: Callable[..., object] | None = None) -> None:
        self._now = execution
        if serves is None:
            serves = execution.function if execution.graphs is None else execution.graphs
        self.call.__globals__["bound"] = self._held(execution, serves)

    def _counter(self) -> itertools.count[int]:
        """What counts the calls after a change: on from where it was, unless graphs served."""
        return itertools.count() if self.graphs is not None else self._now.counter

    def _made(
        self, weights: BoundWeights, edited: EditedSource | None, counter: itertools.count[int]
    ) -> Execution:
        """An execution of a text with these weights, and nothing captured of it yet."""
        by_path = by_path_of(weights)
        bound = {row.name: by_path[row.path] for row in self._program.source.module.bound}
        code = None if edited is None else edited.code
        function = self._program.bind(bound, code=code)
        return Execution(weights, function, edited, counter=counter)

    def _held(self, execution: Execution, serves: Callable[..., object]) -> tuple[object, ...]:
        """What emitted text unpacks; see `piecework.codegen.entry.emit.HELD`."""
        weights = execution.weights
        # Beside weights that the function holds, those that are passed or returned are of the same binding.
        fetch = weights.held if self.made.plan.binds else weights.fetch
        return serves, weights.unchanged, fetch, execution.counter.__next__

    def _execute(
        self,
        execution: Execution,
        serves: Callable[..., object],
        submods_for: Callable[[int], object],
        **probes: object,
    ) -> FunctionType:
        """The emitted text, executed; ``probes`` stand in for those that look at what is active around a call."""
        namespace: dict[str, object] = {
            **self.source.consts,
            **{name: getattr(torch_compat, name) for name in _MODES},
            "same_kernels": self._program.direct_ops.unchanged,
            "dynamo": _ONE_STANCE,
            "stance": _ONE_STANCE._stance,
            "entry_in_stance": self._in_stance,
            "bound": self._held(execution, serves),
            "submods_for": submods_for,
            "entry_with_care": self._with_care,
            "explain_inputs": self._explain_inputs,
            "explain_weights": self._explain_weights,
            "explain_grad_mode": self._explain_grad_mode,
            "entry_without_gradients": self._without_gradients,
            "arguments_as_traced": lambda *values: self._argument_refusal(values) is None,
            "memory_apart": torch_compat.memory_apart,
            "flatten": torch_compat.flatten_tree,
            **probes,
        }
        entry = execute_source(self.source.code, namespace, FUNCTION_NAME)
        torch_compat.keep_out_of_traces(entry, OPAQUE)
        return entry

    # --- refusals ------------------------------------------------------------------------------------

    def accepts(self, args: Sequence[object], kwargs: Mapping[str, object]) -> bool:
        """Whether the trace serves a call with these arguments; runs nothing but the emitted check."""
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
        raise self._refused(
            input_error(self.made.plan, values, lambda: self._argument_refusal(values))
        )

    def _argument_refusal(self, values: Sequence[object]) -> InputError | None:
        """What of the arguments is not as traced, beyond what the emitted check compares; asked after those checks have passed."""
        refusal = None if self._arguments is None else self._arguments(values)
        weights, given = self.weights, self.made.given
        found = self._spans.get(weights)
        if found is None:
            held, span = weights.tensors, torch_compat.memory_span
            found = [[span(held[n]) for n in each.apart] for each in given]
            self._spans[weights] = found
        for each, spans in zip(given, found, strict=True):
            refusal = refusal or each.refusal(weights, spans, values)
        return refusal

    def _explain_weights(self) -> None:
        raise self._refused(self.weights.explain())

    def _explain_grad_mode(self) -> None:
        raise self._refused(
            InputError(
                "the model's code asks whether gradients are recorded, and was traced while none were",
                hint="call it under torch.no_grad(): a stitched model serves inference",
            )
        )

    # --- calls that can't take every shortcut ----------------------------------------------------------

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
        """A call after ``torch.compiler.set_stance``: ``force_eager`` runs the model as it is; the other stances are about compilations."""
        stance = self._stances._stance  # type: ignore[attr-defined]
        if torch_compat.stance_name() == torch_compat.FORCE_EAGER:
            return self.as_it_is(*args, **kwargs)
        if stance is not None:
            # Dynamo's module itself is one look-up less than what stands in until it is imported.
            self._stances = torch_compat.stance_holder()
        self.call.__globals__.update(dynamo=self._stances, stance=stance)
        return self.call(*args, **kwargs)

    def _with_care(self, *args: object, **kwargs: object) -> object:
        """A call while a mode, a transform or autocast is active, or after an operator was overridden.

        What a mode sees, and what another kernel computes, is what the model does: it runs as it is.
        """
        if torch_compat.transforms():
            raise self._refused(
                InputError(
                    "a torch.func transform, forward-mode differentiation or torch.jit.trace is active, which compiled pieces know "
                    "nothing about",
                    hint="transform or trace the model itself, and compile the result",
                )
            )
        reason = self._why_as_it_is()
        if reason:
            if reason not in self.careful_calls:
                _log.warning("%s runs as it is, uncompiled: %s", self._program.name, reason)
            self._count(reason)
            return self.as_it_is(*args, **kwargs)
        autocast = torch_compat.autocast_state()
        if autocast != self.made.autocast:
            shown = ", ".join(f"on for {device} ({dtype})" for device, dtype in autocast) or "off"
            raise self._refused(
                InputError(
                    f"autocast is {shown}, and was not so when the model was traced",
                    hint="compile the model inside the same autocast context",
                )
            )
        if autocast:
            self._count("autocast is on")
        now = self._now
        # torch.set_default_device is a mode for good.
        variant = "under autocast" if autocast else "under a default device"
        if variant not in now.variants:
            idle = dict.fromkeys(_MODES, _never)
            serves, submods_for = self.call.__globals__["bound"][0], self._program.submods_for
            if autocast:
                serves, submods_for = self._by_public_forms(now.function)
                now = replace(now, counter=itertools.count())  # `careful_calls` counts these
            self._now.variants[variant] = self._execute(now, serves, submods_for, **idle)
        return self._now.variants[variant](*args, **kwargs)

    def _by_public_forms(
        self, function: FunctionType
    ) -> tuple[Callable[..., object], Callable[[int], object]]:
        """The stitching function over what compilers hand out, whose wrappers switch autocast off inside of pieces, and its lists by batch size."""
        program, names = self._program, self._program.source.submod_names
        found = [program.callables(each) for each in program.compile_ranges]
        lists = [tuple(each[name] for name in names) for each in found]

        def serves(*flat: object, __vllm_submods__: object = lists[-1]) -> object:
            return function(*flat, __vllm_submods__=__vllm_submods__)

        table = program.range_table
        return serves, lambda batch: lists[0 if table is None else table.index(batch)]

    def _why_as_it_is(self) -> str:
        """The mode, if one is active, that would come to what runs inside pieces, or what else the pieces don't know."""
        if not self._program.direct_ops.unchanged():
            return "an operator was given another kernel"
        if torch_compat.dispatch_modes():
            return "a torch dispatch mode is active"
        if not torch_compat.only_default_device_modes():
            return "a torch function mode is active"
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


def _never() -> bool:
    return False
