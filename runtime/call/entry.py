"""The function that users call: a trace's emitted entry, bound to its program and weights.

Per call nothing here runs: the emitted source does, and this where it changes or something is wrong.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from types import FunctionType, SimpleNamespace

import torch

from piecework.codegen.entry.emit import FUNCTION_NAME, EntrySource
from piecework.codegen.stitch.bind import execute_source
from piecework.errors import InputError, StaticGraphError
from piecework.runtime import torch_compat
from piecework.runtime.call.argument_memory import ArgumentMemory
from piecework.runtime.call.edited import EditedSource
from piecework.runtime.call.entry_plan import MadeEntry, made_entry
from piecework.runtime.call.execution import Execution, Graphs, by_path_of, is_running
from piecework.runtime.call.explain import input_error
from piecework.runtime.pieces.program import Program
from piecework.runtime.trace.errors import OPAQUE, tell_of_gradients
from piecework.runtime.trace.one_trace import ModelTrace
from piecework.runtime.watch.weights import BoundWeights


class Entry:
    """The emitted entry, bound and ready.

    Args:
        captured: what the model's trace gave.
        program: the compiled pieces and the emitted stitching source.
        as_it_is: runs the model uncompiled, for calls in a stance of torch's compiler that wants it so.
        made: what was emitted in another process; None emits it now.

    Attributes:
        source: the emitted text of ``check_inputs`` and ``entry``.
        call: the entry: takes the model's arguments, returns the model's result.
        execution_fn: the emitted stitching function, bound.
        weights: what is bound.
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
        self._program = program
        self._as_it_is = as_it_is
        self.captured = captured
        self.made = made_entry(captured, program) if made is None else made
        self._plan = self.made.plan
        self._arguments = captured.weights.state.argument_check(captured.parameters)
        self._memory = ArgumentMemory(self.made.given)
        self._autocast = self.made.autocast
        self.careful_calls: dict[str, int] = {}
        self._makes_tensors: bool | None = None
        weights = captured.weights
        weights.trust(self.made.strict)
        self.source: EntrySource = self.made.source
        function = program.bind(self._bound(weights))
        self._now = Execution(weights, function)
        self._stances = torch_compat.stance_holder()
        self.call = self._execute(self._probes(), self._now, self._now.serves, program.submods_for)
        self.call.__qualname__ = (
            f"{program.name}.forward"  # Python names it when arguments don't fit
        )
        # None is the stance that is known to change nothing until `_in_stance` has looked at the current one.
        self.call.__globals__.update(dynamo=self._stances, stance=None)

    @property
    def execution_fn(self) -> FunctionType:
        return self._now.function

    @property
    def weights(self) -> BoundWeights:
        return self._now.weights

    @property
    def uncaptured_calls(self) -> int:
        """How many calls ran the stitching function itself since anything was captured or released last."""
        return self._now.uncaptured_calls

    @property
    def edited(self) -> EditedSource | None:
        """The edited text that runs, if one does."""
        return self._now.edited

    def require_idle(self, what: str) -> None:
        """Check that this thread is not inside a call of this entry, as a splitting op is.

        Raises:
            StaticGraphError: it is.
        """
        if is_running(self):
            raise StaticGraphError(
                f"{what} was called from inside a call of the same model, such as by a splitting op",
                hint="call it between calls",
            )

    # --- changes: each publishes another execution, and calls that run keep theirs --------------------

    @property
    def has_graphs(self) -> bool:
        """Whether static graphs serve calls."""
        return self._now.graphs is not None

    def rebound(self) -> Execution:
        """An execution with the weights that the model has now; it serves once it is published.

        Static graphs go on where every weight is the very tensor that was bound, and lies where they read it.

        Raises:
            BindError: a weight is missing or differs in more than its values.
        """
        now = self._now
        weights = now.weights.rebound()
        same = all(map(operator.is_, weights.tensors, now.weights.tensors))
        if same and (now.graphs is None or now.graphs.still_reads(weights)):
            return replace(now, weights=weights, variants={})
        return self._made(weights, now.edited)

    def accept_settings(self) -> None:
        """Take what the model holds in Python now for as good as what it held in the trace."""
        self.publish(replace(self._now, weights=self._now.weights.accepted(), variants={}))

    def edit(self, edited: EditedSource) -> None:
        """Run an edited text in place of the generated stitching source, and of what was captured.

        Raises:
            EmitError: the text can't be executed; what ran before still runs.
        """
        self.publish(self._made(self._now.weights, edited))

    def capture(self, graphs: Graphs) -> None:
        """Serve calls from static graphs that were captured of `execution_fn`."""
        self.publish(replace(self._now, graphs=graphs, variants={}, counter=count()))

    def release(self) -> None:
        """Serve calls by `execution_fn` itself again."""
        self.publish(replace(self._now, graphs=None, variants={}, counter=count()))

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
        self._serve_by(replace(before, beside=beside, variants={}))
        try:
            yield
        finally:
            self._serve_by(before)

    def _serve_by(self, execution: Execution) -> None:
        self._now = execution
        self.call.__globals__["bound"] = self._published(execution, execution.serves)

    def _made(self, weights: BoundWeights, edited: EditedSource | None) -> Execution:
        """An execution of a text with these weights, and nothing captured of it yet."""
        code = None if edited is None else edited.code
        made = Execution(weights, self._program.bind(self._bound(weights), code=code), edited)
        return replace(made, counter=self._now.counter) if self._now.graphs is None else made

    def _published(self, execution: Execution, serves: Callable[..., object]) -> tuple[object, ...]:
        """What emitted text unpacks; see `piecework.codegen.entry.emit.HELD`."""
        weights = execution.weights
        # Beside weights that the function holds, those that are passed or returned are of the same binding.
        fetch = weights.held if self._plan.binds else weights.fetch
        return serves, weights.unchanged, fetch, execution.counter.__next__

    def _bound(self, weights: BoundWeights) -> dict[str, object]:
        """Values of the names that the stitching source holds."""
        source = self._program.source
        by_path = by_path_of(weights)
        return {row.name: by_path[row.path] for row in source.module.bound}

    # --- execution of the emitted text -------------------------------------------------------------

    def _execute(
        self,
        probes: dict[str, object],
        execution: Execution,
        serves: Callable[..., object],
        submods_for: Callable[[int], object],
    ) -> FunctionType:
        namespace: dict[str, object] = {
            **self.source.consts,
            **probes,
            "dynamo": _ONE_STANCE,
            "stance": _ONE_STANCE._stance,
            "entry_in_stance": self._in_stance,
            "bound": self._published(execution, serves),
            "submods_for": submods_for,
            "entry_with_care": self._with_care,
            "explain_inputs": self._explain_inputs,
            "explain_weights": self._explain_weights,
            "explain_grad_mode": self._explain_grad_mode,
            "entry_without_gradients": self._without_gradients,
            "arguments_as_traced": lambda *values: self._argument_refusal(values) is None,
            "memory_apart": torch_compat.memory_apart,
            "flatten": torch_compat.flatten_tree,
        }
        entry = execute_source(self.source.code, namespace, FUNCTION_NAME)
        torch_compat.keep_out_of_traces(entry, OPAQUE)
        return entry

    def _probes(self) -> dict[str, object]:
        return {
            "autocast_enabled": torch_compat.autocast_enabled,
            "dispatch_modes": torch_compat.dispatch_modes,
            "function_modes": torch_compat.function_modes,
            "transforms": torch_compat.transforms,
            "same_kernels": self._program.direct_ops.unchanged,
        }

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

    def _explain_inputs(self, *values: object) -> None:
        error = input_error(self._plan, values, lambda: self._argument_refusal(values))
        error.refused_by = self
        raise error

    def _argument_refusal(self, values: Sequence[object]) -> InputError | None:
        """What of the arguments is not as traced, beyond what the emitted check compares; asked after those checks have passed."""
        if self._arguments is not None:
            refusal = self._arguments.refusal(values)
            if refusal is not None:
                return refusal
        return self._memory.refusal(self.weights, values)

    def _explain_weights(self) -> None:
        raise self._outdated(self.weights.explain())

    def _explain_grad_mode(self) -> None:
        raise self._outdated(
            InputError(
                "the model's code asks whether gradients are recorded, and was traced while none were",
                hint="call it under torch.no_grad(): a stitched model serves inference",
            )
        )

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

    def _outdated(self, error: InputError) -> InputError:
        """``error`` as one of a call that nothing has run for yet."""
        error.outdated = self
        return error

    def _in_stance(self, *args: object, **kwargs: object) -> object:
        """A call after ``torch.compiler.set_stance``: ``force_eager`` runs the model as it is.

        The other stances are about compilations, and a call of what is compiled makes none; what becomes of a call that the
        trace refuses is its owner's business.
        """
        stance = self._stances._stance  # type: ignore[attr-defined]
        if torch_compat.stance_name() == torch_compat.FORCE_EAGER:
            return self._as_it_is(*args, **kwargs)
        if (
            stance is not None
        ):  # Dynamo's module itself is one look-up less than what stands in until it is imported
            self._stances = torch_compat.stance_holder()
        self.call.__globals__.update(dynamo=self._stances, stance=stance)
        return self.call(*args, **kwargs)

    # --- when a shortcut does not hold ---------------------------------------------------------------

    def _with_care(self, *args: object, **kwargs: object) -> object:
        """A call while a mode, a transform or autocast is active, or after an operator was overridden.

        It goes through the dispatcher and the public artifacts, whose wrappers do what is then needed; a mode comes to all that runs
        inside pieces, which are not compiled then.

        Raises:
            InputError: a ``torch.func`` transform is active, or autocast is not as it was in the trace.
        """
        if torch_compat.jit_tracing():
            raise self._outdated(
                InputError(
                    "torch.jit.trace records this call, and would keep what compiled pieces give as constants",
                    hint="trace the model itself; stitched.save keeps what is compiled for another process",
                )
            )
        if torch_compat.transforms():
            raise self._outdated(
                InputError(
                    "a torch.func transform or forward-mode differentiation is active, which compiled pieces know nothing about",
                    hint="transform the model itself, and compile the result",
                )
            )
        autocast = torch_compat.autocast_state()
        if autocast != self._autocast:
            raise self._outdated(
                InputError(
                    f"autocast is {_autocast_text(autocast)}; the model was traced with it {_autocast_text(self._autocast)}",
                    hint="compile the model inside the same autocast context",
                )
            )
        now = self._now
        seen = self._is_seen_into()
        if not seen and self._only_a_default_device(autocast):
            # torch.set_default_device is a mode for good, and changes nothing for compiled pieces.
            unaware = now.variants.get("unaware")
            if unaware is None:
                probes = {**self._probes(), "function_modes": _never}
                unaware = self._execute(probes, now, now.serves, self._program.submods_for)
                now.variants["unaware"] = unaware
            return unaware(*args, **kwargs)
        variant = "as written" if seen else "careful"
        careful = now.variants.get(variant)
        if careful is None:
            careful = now.variants[variant] = self._make_careful(now, as_written=seen)
        reason = self._why_careful(autocast)
        self.careful_calls[reason] = self.careful_calls.get(reason, 0) + 1
        return careful(*args, **kwargs)

    def _why_careful(self, autocast: object) -> str:
        if torch_compat.dispatch_modes():
            return "a torch dispatch mode is active"
        if not self._program.direct_ops.unchanged():
            return "an operator was given another kernel"
        return "autocast is on" if autocast else "a torch function mode is active"

    def _only_a_default_device(self, autocast: object) -> bool:
        return (
            not autocast
            and not torch_compat.dispatch_modes()
            and self._program.direct_ops.unchanged()
            and torch_compat.only_default_device_modes()
        )

    def _is_seen_into(self) -> bool:
        """Whether a mode is active that what runs inside pieces would come to.

        A default device is one for tensors that are made: where the trace had none, they are made on the CPU.
        """
        if torch_compat.dispatch_modes():
            return True
        if not torch_compat.only_default_device_modes():
            return True
        if torch.get_default_device().type == "cpu":
            return False
        if self._makes_tensors is None:
            self._makes_tensors = self._program.asks_for_default_device()
        return self._makes_tensors

    def _make_careful(self, now: Execution, *, as_written: bool) -> Callable[..., object]:
        """The same text, bound to the dispatcher, and to public artifacts or to the graphs of the pieces as they are."""
        code = None if now.edited is None else now.edited.code
        function, submods_for = self._program.bind_safely(
            by_path_of(now.weights), code=code, as_written=as_written
        )
        if now.beside is not None:
            function = now.beside(function)
        apart = replace(now, counter=count())  # `careful_calls` counts these
        return self._execute({**_IDLE, "same_kernels": lambda: True}, apart, function, submods_for)


#: For texts that are reached after the stance was looked at.
_ONE_STANCE = SimpleNamespace(_stance=None)


def _never() -> bool:
    return False


_IDLE = {
    "autocast_enabled": _never,
    "dispatch_modes": _never,
    "function_modes": _never,
    "transforms": _never,
}


def _autocast_text(state: tuple[tuple[str, object], ...]) -> str:
    return ", ".join(f"on for {device} ({dtype})" for device, dtype in state) or "off"
