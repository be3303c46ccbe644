"""The guards of one trace: which of them Dynamo keeps to judge by, and which others look at.

Arguments that the emitted ``check_inputs`` compares, sizes, the state of the process and the model's weights are looked at elsewhere in every call. All other
guards stay Dynamo's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch.utils import _pytree as pytree

from piecework.runtime.torch_compat import Guarded, Place
from piecework.runtime.watch.places import MISSING, LookUps
from piecework.runtime.watch.values import CONSTANTS, OBJECTS

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
# Types of arguments that the emitted check compares by itself, by exact type.
_EMITTED = (int, float, bool, str, bytes, complex, type(None), list, tuple, dict)
_CONTAINERS = (list, tuple, dict)


@dataclass(slots=True)
class SortedGuards:
    """The guards of one trace.

    Attributes:
        on_model: those that Dynamo keeps on the model and on what it reads of modules and classes.
        on_arguments: those that it keeps on arguments.
        tensors: the model's tensors that the trace looked at, by place.
        watched: of these, those that only Dynamo compares: of closures, of classes.
        asks_grad_mode: the model's code asks whether gradients are recorded.
    """

    on_model: list[Guarded] = field(default_factory=list)
    on_arguments: list[Guarded] = field(default_factory=list)
    tensors: list[tuple[Place, torch.Tensor]] = field(default_factory=list)
    watched: list[Place] = field(default_factory=list)
    asks_grad_mode: bool = False

    @property
    def kept(self) -> set[int]:
        """Ids of the guards that Dynamo keeps; that two places lead to one object, the judge compares itself."""
        every = (*self.on_model, *self.on_arguments)
        return {id(each) for each in every if each.kind != "DUPLICATE_INPUT"}


class GuardSorter:
    """Sorts the guards of one trace.

    Args:
        now: what is at places, during the trace.
        arguments: the example call's.
        ordered: Dynamo's names of dictionaries whose order matters; None if that is not known.
        is_weight: whether the tensor at a place is one that a binding finds again.
        asks_tensors: the model's code may ask a tensor for more than its metadata: whether it requires gradients, its class.
    """

    def __init__(
        self,
        now: LookUps,
        arguments: object,
        ordered: Collection[str] | None,
        is_weight: Callable[[Place, torch.Tensor], bool],
        asks_tensors: bool,
    ) -> None:
        self._now, self._ordered = now, ordered
        self._leaves = {id(leaf) for leaf in pytree.tree_leaves(arguments)}
        self._is_weight, self._asks_tensors = is_weight, asks_tensors

    def sort(self, guards: Sequence[Guarded]) -> SortedGuards:
        found = SortedGuards()
        for guard in guards:
            found.asks_grad_mode |= _is_grad_mode(guard)
            if guard.kind in ELSEWHERE or _of_call(guard) or _grows(guard, self._now):
                continue
            on_argument = any(map(is_argument, places_of(guard)))
            if on_argument and self._is_emitted(guard):
                continue
            if guard.kind == "TENSOR_MATCH" and not on_argument and not self._is_kept(guard, found):
                continue
            if guard.kind == "DUPLICATE_INPUT" and not self._is_one(guard):
                continue  # members of sets, which are compared as values
            (found.on_arguments if on_argument else found.on_model).append(guard)
        return found

    def _is_one(self, guard: Guarded) -> bool:
        one, *others = map(self._now.at, places_of(guard))
        return one is not MISSING and all(each is one for each in others)

    def _is_kept(self, guard: Guarded, found: SortedGuards) -> bool:
        """Note a tensor of the model; whether Dynamo has to compare it."""
        tensor = self._now.at(guard.place)
        if not isinstance(tensor, torch.Tensor):
            return True
        found.tensors.append((guard.place, tensor))
        if not self._is_weight(guard.place, tensor):
            found.watched.append(guard.place)
            return True
        return self._asks_tensors

    def _is_emitted(self, guard: Guarded) -> bool:
        """Whether ``check_inputs`` compares what this guards."""
        if not all(map(is_argument, places_of(guard))):
            return False
        if guard.kind in ("DUPLICATE_INPUT", "TENSOR_MATCH"):
            return all(id(self._now.at(place)) in self._leaves for place in places_of(guard))
        if type(self._now.at(guard.place)) not in _EMITTED:
            return False
        *way, _ = guard.place.path()
        plain = all(type(self._now.at(place)) in _CONTAINERS for place in way)
        if guard.kind == "DICT_KEYS_MATCH" and guard.place.base is not None:
            # check_inputs compares keys and leaves their order alone.
            return plain and self._ordered is not None and guard.place.name not in self._ordered
        return plain and guard.kind not in OBJECTS - CONSTANTS


def is_argument(place: Place) -> bool:
    """Whether a place is in the call's arguments."""
    start = place.path()[0]
    return start.kind == "local" and start.key in ("args", "kwargs")


def places_of(guard: Guarded) -> list[Place]:
    """The one or two places that a guard is about."""
    return [guard.place] if guard.other is None else [guard.place, guard.other]


def every_place(guards: Sequence[Guarded]) -> Iterator[Place]:
    """Each place that guards are about, and each on the way to one, once."""
    seen: set[int] = set()
    for guard in guards:
        for start in places_of(guard):
            place: Place | None = start
            while place is not None and id(place) not in seen:
                seen.add(id(place))
                yield place
                place = place.base


def _is_grad_mode(guard: Guarded) -> bool:
    """Whether it is on torch's own question for the grad mode, under a name of the model's."""
    asked = torch.is_grad_enabled
    return guard.known and guard.value is asked and guard.place.key != asked.__name__


def _of_call(guard: Guarded) -> bool:
    """Whether it is about how the model itself is called, which `piecework.runtime.watch.judge` looks at."""
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
