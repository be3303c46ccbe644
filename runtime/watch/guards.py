"""The guards of one trace: which of them Dynamo keeps to judge by, and which others look at.

Arguments that the emitted ``check_inputs`` compares, sizes, the state of the process and the model's weights are looked at elsewhere in every call. All other
guards stay Dynamo's.
"""

from __future__ import annotations

import dis
import os
import sys
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any

import torch
from torch.utils import _pytree as pytree

from piecework.code_objects import with_inner_code
from piecework.errors import CaptureError
from piecework.runtime import torch_compat
from piecework.runtime.torch_compat import Guarded, GuardReader, Place
from piecework.runtime.watch.judge import DynamoJudge
from piecework.runtime.watch.places import MISSING, LookUps
from piecework.runtime.watch.process import ProcessState
from piecework.runtime.watch.reachable import tensors_of
from piecework.runtime.watch.state import CALLS, TracedState
from piecework.runtime.watch.values import (
    CONSTANTS,
    OBJECTS,
    Path,
    PlainValues,
    plain_values,
    weight_path,
)

#: Guards on the process and on sizes; the entry looks at these, or `piecework.runtime.watch.process`.
ELSEWHERE = {
    "SHAPE_ENV",
    "GRAD_MODE",
    "GLOBAL_STATE",
    "DETERMINISTIC_ALGORITHMS",
    "TORCH_FUNCTION_STATE",
    "DEFAULT_DEVICE",
    "FSDP_TRAINING_STATE",
    "AUTOGRAD_SAVED_TENSORS_HOOKS",
    "FUNCTORCH_STACK_MATCH",
    "DUAL_LEVEL",
}
# Types of arguments that the emitted check compares by itself, by exact type.
_EMITTED = (int, float, bool, str, bytes, complex, type(None), list, tuple, dict)
_CONTAINERS = (list, tuple, dict)
# What code says that asks a tensor for more than metadata: for gradients, or whether it is a parameter.
_ASKS_TENSORS = ("requires_grad", "is_leaf", "grad_fn", "retains_grad", "Parameter")


class TraceGuards:
    """Collects the guards of one trace, and sorts them.

    Args:
        model, args, kwargs: what is traced.
        variables: the globals of the function that is traced.
    """

    def __init__(
        self,
        model: object,
        args: Sequence[object],
        kwargs: Mapping[str, object],
        variables: dict[str, object],
    ) -> None:
        self._local = {"model": model, "args": tuple(args), "kwargs": dict(kwargs)}
        self._globals = variables
        self._code: frozenset[types.CodeType] = frozenset()
        self._ordered: frozenset[str] | None = None
        self._asks_tensors = self._asks_grad_mode = False
        self._on_model: list[Guarded] = []
        self._on_arguments: list[Guarded] = []
        self._tensors: list[tuple[Path, torch.Tensor]] = []
        self._watched: list[Place] = []
        self._plain = PlainValues()
        self.reader = GuardReader(self._sort)

    def look_inside(self) -> None:
        """Note what only the running trace knows; for its backend to call."""
        self._code = frozenset(torch_compat.traced_code())
        self._ordered = torch_compat.ordered_places()
        self._asks_tensors = bool(torch_compat.trace_names(*_ASKS_TENSORS))
        torch_compat.leave_guards_untimed()

    def path_of(self, node: torch.fx.Node) -> Path:
        """How to find again the tensor of the model that a graph's input is."""
        place = self.reader.place_of(node)
        return () if place is None else weight_path(place, self._now())

    def _now(self) -> LookUps:
        return LookUps({"local": self._local, "global": self._globals})

    def _sort(self, guards: Sequence[Guarded]) -> list[bool]:
        """Whether Dynamo keeps each; the judge itself compares that two places lead to one object."""
        now, model = self._now(), self._local["model"]
        leaves = {
            id(leaf) for leaf in pytree.tree_leaves((self._local["args"], self._local["kwargs"]))
        }
        held = tensors_of(model) if callable(model) else {}
        for guard in guards:
            self._asks_grad_mode |= _is_grad_mode(guard)
            if guard.kind in ELSEWHERE or _of_call(guard) or _grows(guard, now):
                continue
            on_argument = any(map(is_argument, guard.places))
            if on_argument and self._is_emitted(guard, now, leaves):
                continue
            if guard.kind == "TENSOR_MATCH" and not on_argument and self._is_left(guard, now, held):
                continue
            if guard.kind == "DUPLICATE_INPUT" and not _is_one(guard, now):
                continue  # members of sets, which are compared as values
            (self._on_arguments if on_argument else self._on_model).append(guard)
        every = (*self._on_model, *self._on_arguments)
        self._plain = plain_values(every, now)
        kept = {id(each) for each in every if each.kind != "DUPLICATE_INPUT"}
        return [id(each) in kept for each in guards]

    def _is_left(self, guard: Guarded, now: LookUps, held: Mapping[int, object]) -> bool:
        """Note a tensor of the model; whether a binding finds it again, and nobody else has to compare it."""
        tensor = now.at(guard.place)
        if not isinstance(tensor, torch.Tensor):
            return False
        path = weight_path(guard.place, now)
        self._tensors.append((path, tensor))
        if id(tensor) in held or path:
            return not self._asks_tensors  # for more than metadata: gradients, its class
        self._watched.append(guard.place)
        return False

    def _is_emitted(self, guard: Guarded, now: LookUps, leaves: set[int]) -> bool:
        """Whether ``check_inputs`` compares what this guards."""
        if not all(map(is_argument, guard.places)):
            return False
        if guard.kind in ("DUPLICATE_INPUT", "TENSOR_MATCH"):
            return all(id(now.at(place)) in leaves for place in guard.places)
        if type(now.at(guard.place)) not in _EMITTED:
            return False
        *way, _ = guard.place.path()
        plain = all(type(now.at(place)) in _CONTAINERS for place in way)
        if guard.kind == "DICT_KEYS_MATCH" and guard.place.base is not None:
            # check_inputs compares keys and leaves their order alone.
            return plain and self._ordered is not None and guard.place.name not in self._ordered
        return plain and guard.kind not in OBJECTS - CONSTANTS

    def state(self, code: types.CodeType, names: Mapping[str, str]) -> TracedState:
        """What the trace of ``code`` took from Python.

        Args:
            names: Dynamo's names of arguments → their own.

        Raises:
            CaptureError: this torch does not show its guards.
        """
        local: Any = self._local
        held, root = self._globals, torch_compat.kept_guards(code)
        every = (*self._on_model, *self._on_arguments)
        if root is None and every:
            raise CaptureError(
                "this torch does not show what its trace relied on, so nobody could tell that it changed",
                hint="use a version of torch that piecework was run with",
            )
        # Those globals that guards are about: the others lead to what Dynamo made.
        starts = {str(place.path()[0].key) for each in every for place in each.places}
        scope = {name: held[name] for name in starts if name in held}
        installed = {name: held[name] for name in held if name.startswith("__builtins_dict__")}

        def judge(guards: Sequence[Guarded], wanted: Callable[[str], bool]) -> DynamoJudge:
            part = torch_compat.guards_where(root, wanted) if guards else None
            return DynamoJudge(part, guards, names, scope, installed, held)

        return TracedState(
            _model=local["model"],
            judge=judge(self._on_model, _is_no_argument),
            arguments=judge(self._on_arguments, _is_no_models),
            starts={"local": {"model": local["model"]}, "global": scope},
            code=self._code,
            names=dict(names),
            places=(len(local["args"]), tuple(local["kwargs"])),
            plain=self._plain,
            tensors=self._tensors,
            watched=self._watched,
            asks_grad_mode=self._asks_grad_mode or _asks_grad_mode(self._code),
            process=ProcessState(asks_autocast=_asks_autocast(self._code)),
        )

    def give_back(self) -> None:
        """Forget the example; torch keeps the reader's function."""
        self.reader.give_back()
        self._local, self._globals = {}, {}


def _is_no_argument(name: str) -> bool:
    return not name.startswith(("L['args']", "L['kwargs']"))


def _is_no_models(name: str) -> bool:
    return not name.startswith(("L['model']", "G["))


def _is_one(guard: Guarded, now: LookUps) -> bool:
    one, *others = map(now.at, guard.places)
    return one is not MISSING and all(each is one for each in others)


def is_argument(place: Place) -> bool:
    """Whether a place is in the call's arguments."""
    start = place.path()[0]
    return start.kind == "local" and start.key in ("args", "kwargs")


def _is_grad_mode(guard: Guarded) -> bool:
    """Whether it is on torch's own question for the grad mode, under a name of the model's."""
    asked = torch.is_grad_enabled
    return guard.known and guard.value is asked and guard.place.key != asked.__name__


def _of_call(guard: Guarded) -> bool:
    """Whether it is about how the model itself is called, which `TracedState` looks at."""
    path = guard.place.path()
    if (path[0].kind, path[0].key) != ("local", "model") or len(path) > 2:
        return False
    return (path[1].key if len(path) > 1 else guard.about) in CALLS


def _grows(guard: Guarded, now: LookUps) -> bool:
    """Whether it is on a table that libraries add to: of pytree's classes, of transformers'
    implementations, of what each of its classes can record.
    """
    value = guard.value if guard.known else now.at(guard.place)
    if value is pytree.SUPPORTED_NODES:
        return True
    # Dynamo reaches an entry by its number, and whoever looks there compares the length.
    if any(each.key == "_CAN_RECORD_REGISTRY" for each in guard.place.path()):
        return True
    kind = getattr(sys.modules.get("transformers.utils.generic"), "GeneralInterface", None)
    if kind is None or guard.kind != "DICT_KEYS_MATCH":
        return False
    owner = MISSING if guard.place.base is None else now.at(guard.place.base)
    tables = [each.__dict__.get("_global_mapping") for each in kind.__subclasses__()]
    return any(value is each for each in tables) or (
        isinstance(owner, kind) and owner.__dict__.get("_local_mapping") is value
    )


# --- what the model's code may ask for ------------------------------------------------------------------

_TORCH = os.path.dirname(torch.__file__) + os.sep
_PYTHONS = os.path.dirname(os.__file__) + os.sep
_OURS = str(FilePath(__file__).parents[1]) + os.sep
_CHECKPOINTING = "gradient_checkpointing"


def models_code(code: Iterable[types.CodeType]) -> list[types.CodeType]:
    """The model's own code among some, and all code in it; not torch's, Python's or ours."""
    return [each for each in with_inner_code(list(code)) if _is_models(each.co_filename)]


def _is_models(file: str) -> bool:
    if file.startswith((_TORCH, _OURS)):
        return False
    return not file.startswith(_PYTHONS) or "-packages" + os.sep in file


def asks_strides(code: Iterable[types.CodeType]) -> bool:
    """Whether the model's code may call a tensor's ``stride``: a layer's, which is no method, does not count."""
    return any(
        step.argval == "stride" and (step.opname == "LOAD_METHOD" or _loads_method(step))
        for each in models_code(code)
        for step in dis.get_instructions(each)
    )


def _loads_method(step: dis.Instruction) -> bool:
    """From Python 3.12 on, a bit of ``LOAD_ATTR`` says that what is loaded is called."""
    return sys.version_info >= (3, 12) and step.opname == "LOAD_ATTR" and bool((step.arg or 0) & 1)


def _asks_autocast(code: Iterable[types.CodeType]) -> bool:
    """Whether the model's code may ask for autocast, also where it is off."""
    every = (text for each in models_code(code) for text in (*each.co_names, *each.co_consts))
    return any(type(text) is str and "autocast" in text for text in every)


def _asks_grad_mode(code: Iterable[types.CodeType]) -> bool:
    """Whether the model's code asks torch if gradients are recorded.

    To ask it with whether to checkpoint activations, as libraries of models do, changes no result, and torch's own code asks which of
    two ways to the same result to take.
    """
    for each in models_code(code):
        steps = dis.get_instructions(each)
        names = [s.argval for s in steps if type(s.argval) is str and s.opname != "CACHE"]
        for n, name in enumerate(names):
            around = "".join(names[max(0, n - 3) : n + 3])
            if name == torch.is_grad_enabled.__name__ and _CHECKPOINTING not in around:
                return True
    return False
