"""What a trace took from Python: who judges whether it holds, what to watch for writes, and the check of arguments that ``check_inputs`` leaves to it.

It holds no argument of the example call, and of the model's objects none but the model itself and classes.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from piecework.codegen.entry.plan import Parameter
from piecework.errors import InputError
from piecework.runtime.torch_compat import Place
from piecework.runtime.watch.class_watch import ClassWatch, digest_of, function_of
from piecework.runtime.watch.judge import ONE_OBJECT, Judge, ValueJudge
from piecework.runtime.watch.places import LookUps, Step, place_text
from piecework.runtime.watch.process import ModuleHooks, ProcessState
from piecework.runtime.watch.reachable import leads_to
from piecework.runtime.watch.steps import Steps
from piecework.runtime.watch.values import (
    Path,
    PlainValue,
    PlainValues,
    class_name,
    differences,
)

#: How a module is called: its own forward, and its hooks.
CALLS = (
    "forward",
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_PACKAGE = __name__.partition(".")[0]


@dataclass(frozen=True, slots=True)
class SavedState:
    """A `TracedState` without objects of its process: texts and numbers alone.

    Attributes:
        values: what the trace read.
        methods: the methods that it went through, by class and name, with digests.
        names, places, asks_grad_mode: as in `TracedState`.
        process: torch's global state.
    """

    values: tuple[PlainValue, ...]
    methods: Mapping[str, Mapping[str, str]]
    names: Mapping[str, str]
    places: tuple[int, tuple[str, ...]]
    asks_grad_mode: bool
    process: Mapping[str, Any]

    def differences(self, model: object, classes: ClassWatch) -> list[str]:
        """What is not so for a model of this process, with its traced classes; empty if all is."""
        found = list(differences(model, self.values).values())
        methods = self._of_classes(classes.classes)
        found += filter(None, [ProcessState(**self.process).difference(), *methods])
        hooks = ModuleHooks().present()
        return found + ([f"torch.nn.modules.module has {hooks}"] if hooks else [])

    def _of_classes(self, classes: Iterable[type]) -> Iterable[str]:
        for kind in classes:
            for name, was in self.methods.get(class_name(kind), {}).items():
                if digest_of(kind, name) != was:
                    yield f"{class_name(kind)}.{name} has other code than when the model was saved"


@dataclass(eq=False, slots=True, kw_only=True)
class TracedState:
    """The Python that a captured graph has built in.

    Attributes:
        judge: says what of the model is not as the trace relied on it.
        arguments: says so of arguments, of what ``check_inputs`` leaves to it.
        starts: where places begin: kind and name → object.
        code: what was traced.
        names: Dynamo's names of arguments → their own.
        places: how many arguments were positional, and the order of the others.
        plain: what another process can compare.
        tensors: the model's tensors that the trace looked at, whether the graph reads them or not, each with its path; none once it is over.
        watched: places of those that are no weights: of a closure, a class.
        asks_grad_mode: the model's code asks whether gradients are recorded.
        process: torch's global state.
        classes: the methods that were traced.
    """

    _model: object
    judge: Judge
    arguments: Judge
    starts: Mapping[str, Mapping[str, object]]
    code: frozenset[types.CodeType]
    names: Mapping[str, str]
    places: tuple[int, tuple[str, ...]]
    plain: PlainValues
    process: ProcessState
    tensors: list[tuple[Path, torch.Tensor]] = field(default_factory=list)
    watched: list[Place] = field(default_factory=list)
    asks_grad_mode: bool = False
    classes: ClassWatch = field(init=False)
    _hooks: ModuleHooks = field(default_factory=ModuleHooks)
    _call: tuple[object, ...] = field(init=False)
    _first: Steps | None = None

    def __post_init__(self) -> None:
        self._call = self._own_call()
        self._first = self._first or self._steps()
        self.classes = ClassWatch(self._first.classes, self.code)

    # --- another process ------------------------------------------------------------------------------

    def saved(self) -> SavedState:
        """What another process has to compare; see `PlainValues.untold` for what it can't."""
        process = self.process.as_json()
        return SavedState(
            tuple(self.plain.values),
            self.classes.digests(),
            dict(self.names),
            self.places,
            self.asks_grad_mode,
            process,
        )

    @classmethod
    def loaded(cls, saved: SavedState, model: object) -> TracedState:
        """``saved`` for a model of this process; it holds if `SavedState.differences` finds none."""
        starts = {"local": {"model": model}}
        judge = ValueJudge([each for each in saved.values if not each.of_arguments])
        given = [each for each in saved.values if each.of_arguments]
        first = Steps(judge.guards, LookUps(starts), ())
        code = frozenset(
            function.__code__
            for kind in first.classes
            for name in saved.methods.get(class_name(kind), ())
            if (function := function_of(_static(kind, name))) is not None
        )
        return cls(
            _model=model,
            judge=judge,
            arguments=ValueJudge(given),
            starts=starts,
            code=code,
            names=saved.names,
            places=saved.places,
            plain=PlainValues(list(saved.values)),
            asks_grad_mode=saved.asks_grad_mode,
            process=ProcessState(**saved.process),
            _first=first,
        )

    # --- the model's side -----------------------------------------------------------------------------

    def look(self, weights: Iterable[Place]) -> tuple[list[Step], Callable[[], bool] | None]:
        """How to see that anything changed, or where ``weights`` lie.

        Returns:
            The look-ups that tell, while none is touched, that everything holds but what the second says in every call;
            None if nothing must be asked.
        """
        # What was noted first serves once as it is: what changed since is seen as a change.
        steps, self._first = self._first or self._steps(), None
        steps.watch(weights)
        found = [
            *steps.found.values(),
            *self.classes.steps(),
            *self._hooks.steps(),
            *self._call_steps(),
        ]
        if not steps.blind:
            return found, None
        return found, partial(_holds, self.judge.about(steps.blind), self.starts["local"])

    def _steps(self) -> Steps:
        return Steps(self.judge.guards, LookUps(self.starts), self.watched)

    def holds(self) -> bool:
        """Whether the graph is right about the model as it is now."""
        return not self.difference()

    def difference(self) -> str:
        """The first thing that the graph is wrong about; "" if there is none."""
        return (
            self.process.difference()
            or self._of_call()
            or self.classes.difference()
            or self._hooks.difference()
            or self.judge.difference(self.starts["local"])
        )

    def global_hooks(self) -> str:
        """Which of torch's hooks for every module there are; "" if there are none."""
        return self._hooks.present()

    def accepted(self) -> TracedState:
        """The same, less what does not hold now."""
        others = differences(self._model, self.plain.values)
        values = [each for each in self.plain.values if each not in others]
        now = PlainValues(values, list(self.plain.untold))
        judge = self.judge.less_failing(self.starts["local"])
        other = replace(self, judge=judge, plain=now, _first=None)
        other.classes, other._hooks = self.classes, self._hooks
        return other

    def watched_now(self) -> dict[str, object]:
        """What is now where the trace found tensors that are no weights, by how errors call the place."""
        now = LookUps(self.starts)
        return {place_text(place, self.names): now.at(place) for place in self.watched}

    # --- how the model itself is called -----------------------------------------------------------------

    def _own_call(self) -> tuple[object, ...]:
        """The model's own forward and hooks, told by identity but for the forward."""
        if not isinstance(self._model, torch.nn.Module):
            return ()
        held = self._model.__dict__
        hooks = (held.get(name) or {} for name in CALLS[1:])
        return (held.get("forward"), *(tuple(map(id, each.values())) for each in hooks))

    def _call_steps(self) -> list[Step]:
        if not isinstance(self._model, torch.nn.Module):
            return []
        held = self._model.__dict__
        steps = [Step.of(held, name, holder=self._model) for name in CALLS]
        tables = (held.get(name) for name in CALLS[1:])
        return steps + [Step.of(each, None, "keys") for each in tables if isinstance(each, dict)]

    def _of_call(self) -> str:
        now = self._own_call()
        # A model whose forward was replaced by one that runs the graph runs it behind its own hooks.
        if now == self._call or (
            now[0] is not self._call[0] and leads_to(now[0], self._stands_for_model)
        ):
            return ""
        return "module model has another forward, or other forward hooks, than when the model was traced"

    def _stands_for_model(self, value: object) -> bool:
        ours = type(value).__module__.partition(".")[0] == _PACKAGE
        return ours and getattr(value, "__dict__", {}).get("model") is self._model

    # --- arguments --------------------------------------------------------------------------------------

    def argument_check(self, parameters: Sequence[Parameter]) -> ArgumentCheck | None:
        """The check of what ``check_inputs`` leaves to it; None if it leaves nothing."""
        keyed = [p for p in parameters if p.kind == "**" and getattr(p.node, "keys", ())]
        return ArgumentCheck(self, parameters) if self.arguments.guards or keyed else None

    def argument_refusal(
        self, args: tuple[object, ...], kwargs: Mapping[str, object]
    ) -> InputError | None:
        """The first thing that the graph is wrong about in these arguments; None if there is none."""
        local = {**self.starts["local"], "args": args, "kwargs": kwargs}
        text = self.arguments.difference(local)
        if not text:
            return None
        refusal = _refusal(text)
        if ONE_OBJECT in text:  # which of them are one object, another trace can have otherwise
            refusal.places = frozenset()
        return refusal


def _holds(judge: Judge, variables: Mapping[str, object]) -> bool:
    return not judge.difference(variables)


def _static(kind: type, name: str) -> object:
    return next((each.__dict__[name] for each in kind.__mro__ if name in each.__dict__), None)


def _refusal(text: str) -> InputError:
    hint = "compare them with the example arguments, or compile the model again"
    return InputError(f"the arguments differ from the traced ones: {text}", hint=hint)


class ArgumentCheck:
    """Whether arguments are as the trace saw them, beyond what the emitted check compares.

    It takes one value per parameter of the model.
    """

    def __init__(self, state: TracedState, parameters: Sequence[Parameter]) -> None:
        self._state = state
        count, self._keys = state.places
        self._count = count
        self._parameters = [(p.name, p.kind) for p in parameters]
        self._orders = {p.name: tuple(p.node.keys) for p in parameters if p.kind == "**"}  # type: ignore[union-attr]

    def refusal(self, values: Sequence[object]) -> InputError | None:
        """What is different; None if nothing is."""
        args: list[object] = []
        kwargs: dict[str, object] = {}
        for (name, kind), value in zip(self._parameters, values, strict=True):
            if kind == "*":
                args += value  # type: ignore[arg-type]
            elif kind == "**":
                if tuple(value) != self._orders[name]:  # type: ignore[arg-type]
                    order = ", ".join(self._orders[name])
                    return _refusal(f"{order} were passed in this order when the model was traced")
                kwargs.update(value)  # type: ignore[call-overload]
            elif kind != "k" and len(args) < self._count:
                args.append(value)
            else:
                kwargs[name] = value
        ordered = {key: kwargs[key] for key in self._keys if key in kwargs}
        return self._state.argument_refusal(tuple(args), ordered)
