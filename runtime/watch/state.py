"""What a trace took from Python: who judges whether it holds, what to watch for writes, and the
check of arguments that ``check_inputs`` leaves to it.

It holds no argument of the example call, and of the model's objects none but the model and classes.
"""

import copy
import json
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import torch

from piecework.code_objects import cells_of
from piecework.errors import InputError
from piecework.runtime import torch_compat
from piecework.runtime.torch_compat import Place
from piecework.runtime.watch.dict_watch import Look, LookKind
from piecework.runtime.watch.judge import Judge, ValueJudge
from piecework.runtime.watch.looks import METHOD, Looks, function_of, method_guards, method_looks
from piecework.runtime.watch.places import LookUps, is_argument
from piecework.runtime.watch.values import ONE_OBJECT, PlainValue, plain_values

if TYPE_CHECKING:
    from piecework.codegen.entry.plan import Parameter

_PACKAGE = __name__.partition(".")[0]
ArgumentCheck = Callable[[Sequence[Any]], InputError | None]


# Of torch's global state, what no graph depends on: the entry turns gradients off and looks at modes.
_ENTRY = {"grad_mode", "num_threads", "torch_function", "torch_function_all_disabled"}
_MOST = 8


class ProcessState:
    """torch's global state as a trace took it for given."""

    def __init__(
        self, state: Mapping[str, object] | None = None, asks_autocast: bool = False
    ) -> None:
        self.asks_autocast = asks_autocast
        self.state = torch_compat.global_state() if state is None else state
        self._good: list[torch_compat.GlobalStateGuard] = []
        self.check: Callable[[], bool] = self.holds

    def holds(self) -> bool:
        """Whether the state is as it was in what counts; `check` of every call asks torch first."""
        for each in self._good:
            if each.check():
                self.check = each.check
                return True
        if self.difference():
            return False
        if len(self._good) < _MOST:  # it differs at most in what the graph is right about
            self._good.append(torch_compat.GlobalStateGuard())
        return True

    def difference(self) -> str:
        """What is otherwise than it was; "" if nothing is."""
        now = torch_compat.global_state()
        # The entry serves under the autocast of the trace alone.
        left_out = _ENTRY if self.asks_autocast else _ENTRY | {"autocast_state"}
        for name, was in self.state.items():
            if name not in left_out and now.get(name) != was:
                one, two = (str(each).removeprefix("torch.") for each in (was, now.get(name)))
                return f"torch's {name} was {one} when the model was traced and is {two} now"
        return ""

    def as_json(self) -> dict[str, object]:
        """The state as JSON data."""
        return {"state": json.loads(json.dumps(self.state)), "asks_autocast": self.asks_autocast}


def _hook_tables() -> list[dict[object, object]]:
    """torch's hooks for every module; Dynamo guards none of them."""
    held = vars(torch.nn.modules.module).items()
    return [each for k, each in held if k.startswith("_global_") and isinstance(each, dict)]


@dataclass(frozen=True, slots=True)
class SavedState:
    """A `TracedState` without objects of its process."""

    values: tuple[PlainValue, ...]  # what the trace read, the methods that it went through among it
    names: Mapping[str, str]
    places: tuple[int, tuple[str, ...]]
    asks_grad_mode: bool
    process: Mapping[str, Any]


@dataclass(eq=False, slots=True, kw_only=True)
class TracedState:
    """The Python that a captured graph has built in."""

    model: object
    judge: Judge  # says what of the model is not as the trace relied on it
    arguments: Judge  # says so of arguments, of what ``check_inputs`` leaves to it
    # what another process can compare of these, and reasons why it can't the others
    given: tuple[tuple[PlainValue, ...], tuple[str, ...]]
    starts: Mapping[str, Mapping[str, object]]  # where places begin: kind and name → object
    code: frozenset[types.CodeType]  # what was traced
    names: Mapping[str, str]  # Dynamo's names of arguments → their own
    places: tuple[int, tuple[str, ...]]  # how many arguments were positional; the others in order
    # the model's tensors that the trace looked at, read by the graph or not; none once it is over
    tensors: list[tuple[Place, torch.Tensor]] = field(default_factory=list)
    asks_grad_mode: bool  # the model's code asks whether gradients are recorded
    process: ProcessState
    classes: dict[type, Place] = field(init=False)  # those whose instances the trace looked into
    _forward: object = field(init=False)
    _methods: list[Look] = field(init=False)
    _hooks: list[Look] = field(init=False)
    _first: Looks | None = field(init=False)

    def __post_init__(self) -> None:
        self._forward, self._first = self._own_forward(), self._guarded()
        self.classes = self._first.classes
        self._methods = method_looks(self.classes, self.code)
        self._hooks = [Look.of(each, None, _kind(each)) for each in _hook_tables()]

    # --- another process ------------------------------------------------------------------------------

    def untold(self) -> str:
        """What of it only this process can compare; "" if nothing."""
        if any(look.value for look in self._hooks):
            return "hooks of torch.nn.modules.module"
        return next(iter((*self._plain()[1], *self.given[1])), "")

    def saved(self) -> SavedState:
        """What another process has to compare; it has to hold now."""
        values, rest = (*self._plain()[0], *self.given[0]), (self.places, self.asks_grad_mode)
        return SavedState(values, dict(self.names), *rest, self.process.as_json())

    def _plain(self) -> tuple[tuple[PlainValue, ...], tuple[str, ...]]:
        methods = method_guards(self._methods, self.classes)
        return plain_values((*self.judge.guards, *methods), LookUps(self.starts))

    @classmethod
    def loaded(cls, saved: SavedState, model: object) -> Self:
        """``saved`` for a model of this process; `difference` says whether it holds."""
        now = LookUps.of(model)
        given = tuple(e for e in saved.values if any(map(is_argument, e.guard.places)))
        values = [each for each in saved.values if each not in given]
        methods = (now.at(e.guard.place) for e in values if e.guard.kind == METHOD)
        found = cls(
            model=model,
            judge=ValueJudge(values, saved.names),
            arguments=ValueJudge(given, saved.names),
            given=(given, ()),
            starts={"local": {"model": model}},
            code=frozenset(f.__code__ for f in map(function_of, methods) if f is not None),
            names=saved.names,
            places=saved.places,
            asks_grad_mode=saved.asks_grad_mode,
            process=ProcessState(**saved.process),
        )
        found._hooks = [Look(each, None, (), _kind(each)) for each in _hook_tables()]
        return found

    # --- the model's side -----------------------------------------------------------------------------

    def look(self, weights: Iterable[Place]) -> tuple[list[Look], Callable[[], bool] | None]:
        """How to see that anything changed, or where ``weights`` lie."""
        # What was noted first serves once as it is: what changed since is seen as a change.
        looks, self._first = self._first or self._guarded(), None
        looks.add_weights(weights)
        if isinstance(self.model, torch.nn.Module):
            looks.look(self.model.__dict__, "forward")
        found = [*looks.found.values(), *self._methods, *self._hooks]
        return found, (lambda: not self._judged()) if looks.blind else None

    def _guarded(self) -> Looks:
        return Looks(LookUps(self.starts), self.judge.guards)

    def difference(self) -> str:
        """The first thing that the graph is wrong about; "" if there is none."""
        if changed := self.process.difference():
            return changed
        if (now := self._own_forward()) is not self._forward and not self._is_ours(now):
            return "the model has another forward than when the model was traced"
        for look in (*self._methods, *self._hooks):
            if not look.holds():
                return f"{look} was replaced since the model was traced"
        return self._judged()

    def _judged(self) -> str:
        return self.judge.difference(self.starts["local"])

    def accepted(self) -> Self:
        """The same, less what does not hold now."""
        other = copy.copy(self)
        other.judge, other._first = self.judge.less_failing(self.starts["local"]), None
        return other

    def _own_forward(self) -> object:
        return getattr(self.model, "__dict__", {}).get("forward")

    def _is_ours(self, forward: object) -> bool:
        """Whether a forward that was put on the model has it run by piecework, behind its hooks."""
        held = [forward, getattr(forward, "__self__", None), *cells_of(forward).values()]  # type: ignore[arg-type]
        return any(type(each).__module__.partition(".")[0] == _PACKAGE for each in held)

    # --- arguments --------------------------------------------------------------------------------------

    def argument_check(self, parameters: Sequence["Parameter"]) -> ArgumentCheck | None:
        """Says what ``check_inputs`` leaves of arguments, a value each; None for nothing."""
        orders = {p.name: tuple(p.node.keys) for p in parameters if p.kind == "**"}  # type: ignore[union-attr]
        if not self.arguments.guards and not any(orders.values()):
            return None
        named = [(p.name, p.kind) for p in parameters]
        count, keys = self.places

        def refusal(values: Sequence[Any]) -> InputError | None:
            args: list[object] = []
            kwargs: dict[str, object] = {}
            for (name, kind), value in zip(named, values, strict=True):
                if kind == "*":
                    args += value
                elif kind == "**":
                    if tuple(value) != orders[name]:
                        order = ", ".join(orders[name])
                        return _refusal(f"{order} were passed in this order when it was traced")
                    kwargs.update(value)
                elif kind != "k" and len(args) < count:
                    args.append(value)
                else:
                    kwargs[name] = value
            ordered = {key: kwargs[key] for key in keys if key in kwargs}
            given = {**self.starts["local"], "args": tuple(args), "kwargs": ordered}
            text = self.arguments.difference(given)
            return _refusal(text) if text else None

        return refusal


def _kind(table: object) -> LookKind:
    return "keys" if table else "hooks"


def _refusal(text: str) -> InputError:
    hint = "compare them with the example arguments, or compile the model again"
    error = InputError(f"the arguments differ from the traced ones: {text}", hint=hint)
    if ONE_OBJECT in text:  # which of them are one object, another trace can have otherwise
        error.places = frozenset()
    return error
