"""The guards of one trace: which Dynamo keeps to judge by, and which others look at in every call:
those on arguments that ``check_inputs`` compares, on sizes, on the process, on weights.
"""

import dis
import os
import sys
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any

import torch
import torch.fx
from torch.utils import _pytree as pytree

from piecework.code_objects import with_inner_code
from piecework.errors import CaptureError
from piecework.runtime import torch_compat
from piecework.runtime.torch_compat import Guarded, GuardReader, Place
from piecework.runtime.watch.judge import OBJECTS, DynamoJudge
from piecework.runtime.watch.places import MISSING, MODEL, LookUps, is_argument
from piecework.runtime.watch.state import ProcessState, TracedState
from piecework.runtime.watch.values import plain_values

#: Guards on the process and on sizes; the entry looks at these, or `ProcessState`.
ELSEWHERE = {
    *("SHAPE_ENV", "GRAD_MODE", "GLOBAL_STATE", "DETERMINISTIC_ALGORITHMS", "DUAL_LEVEL"),
    *("TORCH_FUNCTION_STATE", "DEFAULT_DEVICE", "FSDP_TRAINING_STATE"),
    *("AUTOGRAD_SAVED_TENSORS_HOOKS", "FUNCTORCH_STACK_MATCH"),
}
# Types of arguments that the emitted check compares by itself, by exact type.
_EMITTED = (int, float, bool, str, bytes, complex, type(None), list, tuple, dict)
_CONTAINERS = (list, tuple, dict)
# What code says that asks a tensor for more than metadata: for gradients, or whether it is a parameter.
_ASKS_TENSORS = ("requires_grad", "is_leaf", "grad_fn", "retains_grad", "Parameter")


class TraceGuards:
    """Collects the guards of one trace, and sorts them."""

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
        self._tensors: list[tuple[Place, torch.Tensor]] = []
        self.reader = GuardReader(self._sort)

    def look_inside(self) -> None:
        """Note what only the running trace knows; for its backend to call."""
        self._code = frozenset(torch_compat.traced_code())
        self._ordered = torch_compat.ordered_places()
        self._asks_tensors = torch_compat.trace_has_name(*_ASKS_TENSORS)
        torch_compat.leave_guards_untimed()

    def place_of(self, node: torch.fx.Node, tensor: torch.Tensor) -> Place:
        """Where the model's tensor is that a graph's input is; () if that is not known."""
        place = self.reader.place_of(node)
        return place if place and self._now().at(place) is tensor else ()

    def _now(self) -> LookUps:
        return LookUps({"local": self._local, "global": self._globals})

    def _sort(self, guards: Sequence[Guarded]) -> list[bool]:
        """Whether Dynamo keeps each; the judge compares by itself that two places lead to one."""
        now = self._now()
        given = (self._local["args"], self._local["kwargs"])
        leaves = {id(leaf) for leaf in pytree.tree_leaves(given)}
        kept = set()
        for guard in guards:
            self._asks_grad_mode |= _is_grad_mode(guard, now)
            if guard.kind in ELSEWHERE or _is_own_forward(guard) or _grows(guard, now):
                continue
            value, on_argument = now.at(guard.place), any(map(is_argument, guard.places))
            if on_argument and self._is_emitted(guard, now, leaves):
                continue
            if guard.kind == "TENSOR_MATCH" and not on_argument and value is not MISSING:
                self._tensors.append((guard.place, value))
                if not self._asks_tensors:  # a binding finds it again, and compares metadata
                    continue
            (self._on_arguments if on_argument else self._on_model).append(guard)
            if not guard.other:
                kept.add(id(guard))
        self._given = plain_values(self._on_arguments, now)
        return [id(each) in kept for each in guards]

    def _is_emitted(self, guard: Guarded, now: LookUps, leaves: set[int]) -> bool:
        """Whether ``check_inputs`` compares what this guards."""
        if not all(map(is_argument, guard.places)):
            return False
        if guard.kind in ("DUPLICATE_INPUT", "TENSOR_MATCH"):
            ways = ([p[:n] for n in range(1, len(p) + 1)] for p in guard.places)
            hits = ([id(now.at(each)) in leaves for each in way] for way in ways)
            return all(sum(hit) == hit[-1] == 1 for hit in hits)  # a leaf, and inside of none
        if type(now.at(guard.place)) not in _EMITTED:
            return False
        ways = (guard.place[:n] for n in range(1, len(guard.place)))
        plain = all(type(now.at(each)) in _CONTAINERS for each in ways)
        if guard.kind == "DICT_KEYS_MATCH" and len(guard.place) > 1:
            # check_inputs compares keys and leaves their order alone.
            return plain and self._ordered is not None and guard.name not in self._ordered
        return plain and guard.kind not in OBJECTS

    def state(self, code: types.CodeType, names: Mapping[str, str]) -> TracedState:
        """What the trace of ``code`` took from Python; ``names``: Dynamo's → arguments' own."""
        local: Any = self._local
        held, root, now = self._globals, torch_compat.kept_guards(code), self._now()
        every = (*self._on_model, *self._on_arguments)
        if root is None and every:
            why = "this torch does not show what its trace relied on, so nobody could tell that it changed"
            raise CaptureError(why, hint="use a version of torch that piecework was run with")
        # Those globals that guards are about: the others lead to what Dynamo made.
        places = [place for each in every for place in each.places]
        first = {str(each[0][1]) for each in (*places, *(place for place, _ in self._tensors))}
        starts = {
            "local": {"model": local["model"]},
            "global": {name: held[name] for name in first if name in held},
        }

        def judge(guards: Sequence[Guarded], *apart: str) -> DynamoJudge:
            part = guards and torch_compat.guards_where(root, lambda at: not at.startswith(apart))
            return DynamoJudge(guards, part or None, starts, self.reader.names, names, held, now)

        return TracedState(
            model=local["model"],
            judge=judge(self._on_model, "L['args']", "L['kwargs']"),
            arguments=judge(self._on_arguments, "L['model']", "G["),
            given=self._given,
            starts=starts,
            code=self._code,
            names=dict(names),
            places=(len(local["args"]), tuple(local["kwargs"])),
            tensors=self._tensors,
            asks_grad_mode=self._asks_grad_mode or _asks_grad_mode(self._code),
            process=ProcessState(asks_autocast=says(self._code, "autocast")),
        )

    def give_back(self) -> None:
        """Forget the example; torch keeps the reader's function."""
        self.reader.give_back()
        self._local, self._globals = {}, {}


def _is_grad_mode(guard: Guarded, now: LookUps) -> bool:
    """Whether it is on torch's own question for the grad mode, under a name of the model's."""
    asked = torch.is_grad_enabled
    return guard.place[-1][1] != asked.__name__ and now.at(guard.place) is asked


def _is_own_forward(guard: Guarded) -> bool:
    """Whether it is about the model's own ``forward``, which `TracedState` looks at."""
    every = (*(key for _, key in guard.place[1:]), guard.about)
    names = [name for name in every if name not in ("__dict__", None)]
    return guard.place[:1] == MODEL and names == ["forward"]


def _grows(guard: Guarded, now: LookUps) -> bool:
    """Whether it is on a table that libraries add to."""
    value = now.at(guard.place)
    if value is pytree.SUPPORTED_NODES:
        return True
    # Dynamo reaches an entry by its number, and whoever looks there compares the length.
    if any(key == "_CAN_RECORD_REGISTRY" for _, key in guard.place):
        return True
    kind = getattr(sys.modules.get("transformers.utils.generic"), "GeneralInterface", None)
    if kind is None or guard.kind != "DICT_KEYS_MATCH":
        return False
    owner = now.at(guard.place[:-1])
    tables = [each.__dict__.get("_global_mapping") for each in kind.__subclasses__()]
    return any(value is each for each in tables) or (
        isinstance(owner, kind) and owner.__dict__.get("_local_mapping") is value
    )


_TORCH = os.path.dirname(torch.__file__) + os.sep
_PYTHONS = os.path.dirname(os.__file__) + os.sep
_OURS = str(FilePath(__file__).parents[1]) + os.sep


def models_code(code: Iterable[types.CodeType]) -> list[types.CodeType]:
    """The model's own code among some, and all code in it; not torch's, Python's or ours."""
    return [
        each
        for each in with_inner_code(list(code))
        if not each.co_filename.startswith((_TORCH, _OURS))
        if not each.co_filename.startswith(_PYTHONS) or f"-packages{os.sep}" in each.co_filename
    ]


def says(code: Iterable[types.CodeType], word: str) -> bool:
    """Whether a name or a text in the model's code has ``word`` in it."""
    every = (text for each in models_code(code) for text in (*each.co_names, *each.co_consts))
    return any(type(text) is str and word in text for text in every)


def _asks_grad_mode(code: Iterable[types.CodeType]) -> bool:
    """Whether the model's code asks if gradients are recorded, but to checkpoint activations."""
    for each in models_code(code):
        loaded = [step.argval for step in dis.get_instructions(each)]
        asked = loaded.count(torch.is_grad_enabled.__name__)
        if asked > sum("gradient_checkpointing" in str(name) for name in loaded):
            return True
    return False
