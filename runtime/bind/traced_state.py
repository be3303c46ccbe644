"""What a trace took from Python, and whether it is still so. In: the guards of one trace. Out: a `TracedState`: look-ups to watch, a verdict once something was touched, and checks of arguments.

It holds no argument of the example call, and changes nothing of the model's.
"""

from __future__ import annotations

import os
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch

from piecework.codegen.entry.plan import Parameter
from piecework.errors import CaptureError, InputError
from piecework.runtime import torch_compat
from piecework.runtime.bind.class_watch import ClassWatch
from piecework.runtime.bind.facts import CONSTANT_KINDS, Fact, Values, place_text
from piecework.runtime.bind.guards import Bins, every_place, misread, sort_guards
from piecework.runtime.bind.observable import Touch
from piecework.runtime.bind.places import Step
from piecework.runtime.bind.reachable import leads_to
from piecework.runtime.bind.unguarded import misanswered
from piecework.runtime.torch_compat import Guarded, GuardReader, Place

_PACKAGE = __name__.partition(".")[0]
_ROOMS = os.path.dirname(os.path.dirname(__file__))
# What calls the model, and packs its result; what stands on layers that share a trace.
_OWN = tuple(os.path.join(_ROOMS, room) + os.sep for room in ("bind", "regions"))


class Layers(Protocol):
    """The marks on layers that share a trace; see `piecework.runtime.trace.shared`."""

    def without_marks(self, guards: Sequence[Guarded], values: Values) -> Sequence[Guarded]: ...

    def complete(self, bins: Bins, guards: Sequence[Guarded]) -> None: ...


class TraceGuards:
    """Collects the guards of one trace.

    Args:
        model, args, kwargs: what is traced.
        variables: the globals of the function that is traced.
        layers: what is known of layers that share the trace.
    """

    def __init__(
        self,
        model: object,
        args: Sequence[object],
        kwargs: Mapping[str, object],
        variables: Mapping[str, object],
        layers: Layers | None = None,
    ) -> None:
        arguments = {"args": tuple(args), "kwargs": dict(kwargs)}
        self._starts = {"local": {"model": model, **arguments}, "global": variables}
        self._arguments = tuple(arguments.values())
        self._code: frozenset[types.CodeType] = frozenset()
        self._ordered: frozenset[str] | None = None
        self._bins: Bins | None = None
        self._layers = layers
        self._failed: Exception | None = None
        self.reader = GuardReader(self._sort)

    def look_inside(self) -> None:
        """Note what only the running trace knows; for its backend to call."""
        code = torch_compat.traced_code()
        self._code = frozenset(each for each in code if not each.co_filename.startswith(_OWN))
        self._ordered = torch_compat.ordered_places()
        torch_compat.leave_guards_untimed()

    def values(self) -> Values:
        """What is at places while the trace runs."""
        return Values(self._starts)

    def _sort(self, guards: Sequence[Guarded]) -> list[bool]:
        values, layers = self.values(), self._layers
        known = guards if layers is None else layers.without_marks(guards, values)
        self._bins = sort_guards(known, values, self._arguments, self._code, self._ordered)
        missing = misread(known, values)
        if missing:
            self._failed = CaptureError(
                f"Dynamo found {missing}, which raises an AttributeError in Python",
                where=missing,
                hint="let __getattribute__ find what the class holds, or leave the attribute out of the class",
            )
        self._failed = self._failed or self._of_other_modules(known, values)
        self._failed = self._failed or misanswered(known, self._code)
        if layers is not None:
            try:
                layers.complete(self._bins, known)
            except Exception as error:  # noqa: BLE001  (raised by `state`: Dynamo would wrap it)
                self._failed = error
        left = set(map(id, self._bins.left))
        return [id(each) in left for each in guards]

    def _of_other_modules(self, guards: Sequence[Guarded], values: Values) -> CaptureError | None:
        """What is wrong if Dynamo guarded the globals of some function in a module that is not the function's own."""
        looked = map(values.at, every_place(guards))
        function = torch_compat.guarded_elsewhere(looked, self._code)
        if function is None:
            return None
        name = function.__globals__["__name__"]
        return CaptureError(
            f"{function.__qualname__} is of a module {name} that is not the one imported by that name now, where Dynamo looks for what it reads",
            where=name,
            hint="make the model from the module that is imported now, or load the other one by a name of its own",
        )

    def state(self, code: types.CodeType, names: Mapping[str, str]) -> TracedState:
        """What the trace of ``code`` took from Python.

        Args:
            names: Dynamo's names of arguments → their own.

        Raises:
            CaptureError: this torch does not show its guards.
        """
        if self._failed is not None:
            raise self._failed
        bins, manager = self._bins, torch_compat.kept_guards(code)
        if bins is None or (bins.left and manager is None):
            raise CaptureError(
                "this torch does not show what its trace relied on, so nobody could tell that it changed",
                hint="use a version of torch that piecework was run with",
            )
        local, model = self._starts["local"], self._starts["local"]["model"]
        examples = tuple(local["args"]), tuple(local["kwargs"])  # type: ignore[arg-type, call-overload]
        return TracedState(
            model,
            {"local": {"model": model}, "global": self._globals(bins)},
            bins,
            manager if bins.left else None,
            self._code,
            dict(names),
            (len(examples[0]), examples[1]),
        )

    def _globals(self, bins: Bins) -> dict[str, object]:
        """Those that facts are about: the others lead to what Dynamo made."""
        held = self._starts["global"]
        names = {str(fact.place.path()[0].key) for fact in (*bins.facts, *bins.argument_facts)}
        return {name: held[name] for name in names if name in held}

    def give_back(self) -> None:
        """Forget the example; torch keeps the reader's function."""
        self.reader.give_back()
        self._starts, self._arguments, self._layers = {}, (), None


@dataclass(eq=False, slots=True)
class TracedState:
    """The Python that a captured graph has built in.

    Attributes:
        starts: where places begin: kind and name → object.
        bins: the facts.
        code: what was traced.
        names: what errors call arguments.
        places: how many arguments were positional, and the order of the others.
        classes: the watch over classes.
        tensors: the model's tensors that the trace looked at, by place, whether the graph reads them or not; none once it is over.
        watched: places of those that are no weights: of a closure, a class.
    """

    _model: object
    starts: Mapping[str, Mapping[str, object]]
    bins: Bins
    _left: Any
    code: frozenset[types.CodeType]
    names: Mapping[str, str]
    places: tuple[int, tuple[str, ...]]
    _asked: tuple[frozenset[str] | None] | None = None
    classes: ClassWatch = field(init=False)
    _forward: object = field(init=False)
    _global_hooks: tuple[Step, ...] = field(default_factory=lambda: tuple(_global_hooks()))
    _dtype: torch.dtype = field(default_factory=torch.get_default_dtype)
    watched: list[Place] = field(default_factory=list)
    _touched: Touch | None = None
    _looked: bool = field(init=False, default=False)
    _of_classes: list[Step] = field(init=False)

    def __post_init__(self) -> None:
        self._forward = self._own_forward()
        if self._touched is None:
            self._touched = Touch(self.bins.facts, Values(self.starts))
        self._watch_classes(self._touched.classes)

    def watch_code(self, code: frozenset[types.CodeType]) -> None:
        """Watch this code as what was traced."""
        self.code = code
        self._watch_classes(self.classes.classes)

    def _watch_classes(self, classes: Iterable[type]) -> None:
        self.classes = ClassWatch(classes, self.code, self._asked)
        self._of_classes = self.classes.steps()

    @property
    def tensors(self) -> list[tuple[Place, torch.Tensor]]:
        return self.bins.tensors

    # --- the model's side ----------------------------------------------------------------------------

    def look(self) -> tuple[list[Step], Callable[[], bool] | None]:
        """How to see that anything changed.

        Returns:
            The look-ups that tell, while none is touched, that everything holds but what the second compares, in every call;
            None if nothing must be.
        """
        # What was noted first serves once as it is: what changed since is seen as a change.
        touch = self._renewed() if self._looked else self._touched
        if touch is None:
            touch = Touch(self.bins.facts, Values(self.starts))
        if self._looked:
            self._of_classes = self.classes.steps()
        self._touched, self._looked = touch, True
        steps = [*touch.steps.values(), *self._of_classes, *self._global_hooks]
        left = self._left is not None and not self.bins.left_on_arguments
        return steps, partial(self._hold, touch.always) if touch.always or left else None

    def _renewed(self) -> Touch | None:
        """What was watched, noted again; None where what facts rest on may lie elsewhere now."""
        if self._touched is None or not all(step.holds() for step in self._of_classes):
            return None
        return self._touched.renewed()

    def _hold(self, facts: Sequence[Fact]) -> bool:
        values = Values(self.starts)
        return all(self._holds(fact, values) for fact in facts) and not self._left_failing()

    def same_process(self) -> Callable[[], bool]:
        """Whether what the trace took from the process is so: the default dtype."""
        read, dtype = torch.get_default_dtype, self._dtype
        return lambda: read() is dtype

    def _hooks_of_all(self) -> str:
        """Which of torch's hooks for every module are not those of the trace; Dynamo guards none of them."""
        for step in self._global_hooks:
            if not step.holds():
                return f"torch.nn.modules.module.{step.path} has other hooks than when the model was traced"
        return ""

    def global_hooks(self) -> str:
        """Which of torch's hooks for every module there are; "" if there are none."""
        held = (step for step in self._global_hooks if step.kind == "keys" and step.value)
        return next((step.path for step in held), "")

    def holds(self) -> bool:
        """Whether the graph is right about the model as it is now."""
        return not self.difference()

    def difference(self) -> str:
        """The first thing that the graph is wrong about; "" if there is none."""
        if torch.get_default_dtype() is not self._dtype:
            return f"the default dtype was {self._dtype} when the model was traced and is {torch.get_default_dtype()} now"
        values = Values(self.starts)
        wrong = [fact for fact in self.bins.facts if not self._holds(fact, values)]
        if wrong:
            return _clearest(wrong).difference(values, self.names)
        return self.classes.difference() or self._hooks_of_all() or self._left_failing()

    def _holds(self, fact: Fact, values: Values) -> bool:
        # A model whose forward was replaced by one that runs the graph runs it behind its own hooks.
        return fact.holds(values) or (fact.of_call and self._is_run_by_forward())

    def _is_run_by_forward(self) -> bool:
        forward = self._own_forward()
        return forward is not self._forward and leads_to(forward, self._stands_for_model)

    def _stands_for_model(self, value: object) -> bool:
        ours = type(value).__module__.partition(".")[0] == _PACKAGE
        return ours and getattr(value, "__dict__", {}).get("model") is self._model

    def _own_forward(self) -> object:
        model = self._model
        return model.__dict__.get("forward") if isinstance(model, torch.nn.Module) else None

    def _left_failing(self) -> str:
        if self._left is None or self.bins.left_on_arguments:
            return ""
        return self._left_text({**self.starts["local"]})

    def _left_text(self, variables: Mapping[str, object]) -> str:
        text = torch_compat.failing_guard(self._left, variables)
        return (
            f"what the trace relied on holds no longer: {text.partition('#')[0].strip()}"
            if text
            else ""
        )

    def watch_tensor(self, place: Place, tensor: torch.Tensor) -> None:
        """Compare a tensor of the model by kind: nothing else can tell that it was replaced."""
        self.bins.facts.append(Fact.of(place, "TENSOR_MATCH", tensor))
        self._touched = None
        self.watched.append(place)

    def watched_now(self) -> dict[str, object]:
        """What is now where the trace found tensors that are no weights, by how errors call the place."""
        values = Values(self.starts)
        return {place_text(place, self.names): values.at(place) for place in self.watched}

    def accepted(self) -> TracedState:
        """The same, less the facts that don't hold now."""
        values = Values(self.starts)
        facts = [fact for fact in self.bins.facts if self._holds(fact, values)]
        touch = self._renewed()
        if touch is not None:
            known = set(map(id, facts))
            touch.always = [fact for fact in touch.always if id(fact) in known]
        return replace(self, bins=replace(self.bins, facts=facts), _touched=touch)

    # --- arguments ------------------------------------------------------------------------------------

    def argument_check(self, parameters: Sequence[Parameter]) -> ArgumentCheck | None:
        """The check of what ``check_inputs`` leaves to it; None if it leaves nothing."""
        keyed = [p for p in parameters if p.kind == "**" and getattr(p.node, "keys", ())]
        if not (self.bins.argument_facts or self.bins.left_on_arguments or keyed):
            return None
        return ArgumentCheck(self, parameters)

    def argument_refusal(
        self, args: tuple[object, ...], kwargs: Mapping[str, object]
    ) -> InputError | None:
        """The first thing that the graph is wrong about in these arguments; None if there is none."""
        local = {**self.starts["local"], "args": args, "kwargs": kwargs}
        values = Values({**self.starts, "local": local})
        for fact in self.bins.argument_facts:
            if not fact.holds(values):
                refusal = _refusal("argument " + fact.difference(values, self.names))
                if (
                    fact.other is not None
                ):  # which of them are one object, another trace can have otherwise
                    refusal.places = frozenset()
                return refusal
        text = self._left_text(local) if self.bins.left_on_arguments else ""
        return _refusal(text) if text else None


def _refusal(text: str) -> InputError:
    hint = "compare them with the example arguments, or compile the model again"
    return InputError(text, hint=hint)


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
                    return _refusal(
                        f"the arguments {', '.join(self._orders[name])} were passed in this order when the model was traced"
                    )
                kwargs.update(value)  # type: ignore[call-overload]
            elif kind != "k" and len(args) < self._count:
                args.append(value)
            else:
                kwargs[name] = value
        ordered = {key: kwargs[key] for key in self._keys if key in kwargs}
        return self._state.argument_refusal(tuple(args), ordered)


def _global_hooks() -> Iterator[Step]:
    held = vars(torch.nn.modules.module)
    for name, value in held.items():
        if name.startswith("_global_") and isinstance(value, dict):
            yield Step.of(held, name, name)
            yield Step.of(value, None, name, "keys")


def _clearest(facts: Sequence[Fact]) -> Fact:
    """The fact that says best what happened: a module of another class, then a value, then anything."""
    for fact in facts:
        if fact.kind == "TYPE_MATCH" and issubclass(fact.expected, torch.nn.Module):  # type: ignore[arg-type]
            return fact
    return next((fact for fact in facts if fact.kind in CONSTANT_KINDS), facts[0])
