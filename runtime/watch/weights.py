"""The weights of a trace: whether the model still holds them, as traced, and what it holds now.

Every call looks whether each name leads to the bound tensor, and at the tensors' metadata, but of
weights that only matrix products of ATen read: the products and compiled code compare them.
"""

import copy
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch

from piecework.codegen.graph.structure import taken_apart
from piecework.errors import BindError, CaptureError, ConfigError, InputError, did_you_mean
from piecework.runtime import torch_compat
from piecework.runtime.torch_compat import Place
from piecework.runtime.watch.dict_watch import DictWatch
from piecework.runtime.watch.places import MISSING, LookUps, by_attributes, place_text, portable
from piecework.runtime.watch.reachable import own_tensors
from piecework.runtime.watch.state import TracedState

_TRIES = 16
_FIXED = "the graph has it as it was traced: put it back, or compile the model again"
_ONE_KIND = "compiled pieces are made for one dtype, device and shape: compile the model again"
_PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


@dataclass(frozen=True, slots=True)
class Traced:
    """A weight as the trace saw it: its metadata, and of a subclass the tensors in it."""

    path: str
    facts: Mapping[str, object]
    inner: tuple[Self, ...] = ()

    @classmethod
    def of(cls, path: str, tensor: torch.Tensor) -> Self:
        facts, inner = _facts(tensor)
        return cls(path, facts, tuple(cls.of(name, each) for name, each in inner.items()))

    def difference(self, tensor: object) -> str:
        """How ``tensor`` differs from what was traced; "" if it does not."""
        if not isinstance(tensor, torch.Tensor):
            return f"is a {type(tensor).__qualname__} now"
        facts, inner = _facts(tensor)
        if facts["class"] is not self.facts["class"]:
            traced: Any = self.facts["class"]
            return f"is a {type(tensor).__qualname__} now; the trace had a {traced.__qualname__}"
        for what, was in self.facts.items():
            if facts[what] != was:
                verb = "is made as" if what == "settings" else f"has {what}"
                return f"{verb} {facts[what]}; the trace had {was}"
        for each in self.inner:
            if difference := each.difference(inner.get(each.path)):
                return f"holds a tensor {each.path} that {difference}"
        return "is a lazily negated or conjugated view now" if torch_compat.is_lazy(tensor) else ""


def _facts(tensor: torch.Tensor) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What must stay as it is about a tensor, and the tensors that a subclass is made of."""
    inner, settings = taken_apart(tensor) or ({}, None)
    facts = {
        "class": torch.Tensor if type(tensor) in _PLAIN else type(tensor),
        "dtype": tensor.dtype,
        "layout": tensor.layout,
        "device": tensor.device,
        "shape": tuple(tensor.shape),
        "stride": tensor.stride() if tensor.layout is torch.strided else (),
        "settings": copy.deepcopy(settings),
    }
    return facts, inner


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor that the model holds: an input of the graph, or only returned."""

    path: str  # what piecework calls it
    tensor: torch.Tensor  # the weight
    # how the model's code reached it; () if that is not known, and it has a name of its own
    way: Place = ()


@dataclass(eq=False)
class BoundWeights:
    """The weights that emitted code holds, and how to find them again in the model."""

    traced: tuple[Traced, ...]  # in order of the graph's inputs, then those that are only returned
    tensors: list[torch.Tensor]  # the bound tensors, in the same order
    taken: tuple[Place, ...]  # how the model's code reached each; see `Weight.way`
    _ways: tuple[tuple[Place, ...], ...]
    state: TracedState
    _strict: frozenset[str] = frozenset()
    # whether the model still holds them, as they were traced; for every call
    unchanged: Callable[[], bool] = field(default=lambda: True, repr=False)
    _metadata: Callable[[], bool] = field(default=lambda: True, repr=False)

    @classmethod
    def of(
        cls,
        roots: Sequence[tuple[str, torch.nn.Module]],
        weights: Sequence[Weight],
        state: TracedState,
    ) -> Self:
        """Find each weight where its way leads, and by all its names under ``roots``."""
        names, now = _names(roots), LookUps(state.starts)
        weights = [replace(each, way=by_attributes(each.way)) for each in weights]
        ways = []
        for each in weights:
            places = dict.fromkeys((*names.get(id(each.tensor), ()), each.way))
            ways.append(tuple(way for way in places if way and now.at(way) is each.tensor))
            if not ways[-1]:
                raise out_of_reach(each.path)
        found = cls(
            tuple(Traced.of(each.path, each.tensor) for each in weights),
            [each.tensor for each in weights],
            tuple(portable(each.way, now) if each.way else () for each in weights),
            tuple(ways),
            state,
        )
        found.unchanged = found._check()
        return found

    def names(self) -> list[frozenset[str]]:
        """All names of each weight under the model's modules: tied ones have several."""
        return [
            frozenset(place_text(place) for place in places if place[0][0] == "root")
            for places in self._ways
        ]

    def _check(self) -> Callable[[], bool]:
        """The check of every call."""
        self.trust(self._strict)
        thorough = torch_compat.metadata_guard(self.tensors)
        state, process = self.state, self.state.process
        places = [place for places in self._ways for place in places]
        looks, always = state.look(places)
        # What is noted first is as the trace found it: what changed since is seen as a change.
        watch = DictWatch(looks) if self._moved() is None else None
        del looks

        def unchanged() -> bool:
            nonlocal watch, always
            if not (process.check() or process.holds()) or (always is not None and not always()):
                return False
            known = watch
            if known is not None and (
                (known.untouched() and self._metadata()) or (known.compare() and thorough())
            ):
                return True
            watch = known = None  # so that what the model dropped can go
            noted, always = state.look(places)
            if self._moved() is not None or state.difference():
                return False
            watch = DictWatch(noted)
            return thorough()

        return unchanged

    def _moved(self) -> Place | None:
        """The first name of a weight that does not lead to it."""
        pairs, now = zip(self._ways, self.tensors, strict=True), LookUps(self.state.starts)
        moved = (way for ways, tensor in pairs for way in ways if now.at(way) is not tensor)
        return next(moved, None)

    def accepted(self) -> Self:
        """The same, less what is not as it was: the caller had set it for the trace alone."""
        return self._with(state=self.state.accepted())

    def _with(self, **changes: object) -> Self:
        """Another binding, with a check of its own: calls may still use this one."""
        other = replace(self, **changes)  # type: ignore[arg-type]
        other.unchanged = other._check()
        return other

    def trust(self, paths: frozenset[str]) -> None:
        """Leave weights out of the comparison that only operators read which compare themselves."""
        self._strict = paths
        self._metadata = torch_compat.metadata_guard(
            [t for w, t in zip(self.traced, self.tensors, strict=True) if w.path not in paths]
        )

    def held(self) -> list[torch.Tensor]:
        """The weights as bound, for a stitched function that holds others of them."""
        return self.tensors

    def fetch(self) -> list[torch.Tensor]:
        """The weights of now, for a stitched function that takes them in every call."""
        return self.tensors if self.unchanged() else self.current()

    # --- the weights of now ------------------------------------------------------------------------

    def current(self) -> list[torch.Tensor]:
        """The weights that the model holds now."""
        found = []
        now, again = (LookUps(self.state.starts) for _ in range(2))
        for weight, ways in zip(self.traced, self._ways, strict=True):
            tensor = now.at(ways[0])
            if again.at(ways[0]) is not tensor:
                why = f"weight {weight.path} is computed at each access now"
                hint = "compile the model again: the computation belongs into the graph"
                raise BindError(why, hint=hint)
            missing = tensor is None or tensor is MISSING
            if difference := "is no longer there" if missing else weight.difference(tensor):
                raise BindError(f"weight {weight.path} {difference}", hint=_ONE_KIND)
            for way in ways[1:]:  # of two, the graph would read only one
                if now.at(way) is not tensor:
                    why = f"{place_text(way)} and {weight.path} were one tensor when the model was traced and are two now"
                    hint = "tie them again (most models have tie_weights()), or compile the model again"
                    raise BindError(why, hint=hint)
            found.append(tensor)
        return found

    def rebound(self) -> Self:
        """What the model holds now, as another binding."""
        found = self.current()
        for _ in range(_TRIES):
            other = self._with(tensors=found)
            if changed := self.state.difference():
                raise BindError(changed, hint=_FIXED)
            # The check was made after the weights were read: between the two another thread may have replaced some.
            found, before = self.current(), found
            if all(map(operator.is_, found, before)):
                return other
        why = "weights were replaced by another thread all the while"
        raise BindError(why, where="rebind", hint="rebind when all weights are in place")

    def explain(self) -> InputError:
        """What changed, for a call that found something changed."""
        return self.change() or InputError(
            "the weights changed since they were bound", hint="call rebind() on the stitched module"
        )

    def change(self) -> InputError | None:
        """The first thing that is not as it was bound, if any."""
        moved = self._moved()
        if moved is not None:
            why = f"{place_text(moved)} was replaced since the weights were bound"
            hint = "call rebind() on the stitched module after loading, replacing or moving weights"
            return InputError(why, hint=hint)
        changed = self.state.difference()
        if changed:
            return InputError(changed, hint=_FIXED)
        for weight, tensor in zip(self.traced, self.tensors, strict=True):
            if difference := weight.difference(tensor):
                return InputError(f"weight {weight.path} {difference}", hint=_ONE_KIND)
        return None


def _unfit(old: torch.Tensor, new: object) -> str:
    """Why the values of ``new`` can't be copied to where ``old`` lies; "" if they can."""
    if not isinstance(new, torch.Tensor):
        return f"the new weight must be a tensor; got a {type(new).__qualname__}"
    if new.is_meta and not old.is_meta:
        return "the new weight is on the meta device, which holds no data"
    (held, inner), (given, others) = _facts(old), _facts(new)
    whats = ("dtype", "shape", "settings", *(["class"] if inner or others else []))
    for what in (each for each in whats if held[each] != given[each]):
        return f"the weight has {what} {held[what]}, the new one {given[what]}"
    pairs = ((each, others.get(name)) for name, each in inner.items())
    return next(filter(None, (_unfit(*pair) for pair in pairs)), "")


def _names(roots: Sequence[tuple[str, torch.nn.Module]]) -> dict[int, list[Place]]:
    """Every name of every parameter and buffer, by identity: a tied weight has several."""
    found: dict[int, list[Place]] = {}
    for prefix, root in roots:
        start: Place = (("root", (prefix.removesuffix("."), root)),)
        for path, tensor in own_tensors(root):
            place = (*start, *(("attribute", name) for name in path.split(".")))
            found.setdefault(id(tensor), []).append(place)
    return found


def out_of_reach(path: str) -> CaptureError:
    """What to raise for a weight of the trace that nobody finds again."""
    why = f"weight {path} can't be looked up again, so nobody could tell that it was replaced"
    hint = "hold it as a parameter, a buffer, or in an attribute, list or dictionary of the model"
    return CaptureError(why, hint=hint)


def refit(
    model: object, state: Mapping[str, torch.Tensor]
) -> Callable[[], list[tuple[torch.Tensor, torch.Tensor]]]:
    """Check ``state``; gives each weight with its new value, to be copied while nobody calls.

    Raises:
        ConfigError: ``state`` is no mapping.
        BindError: as `StitchedModule.refit`.
    """
    if not isinstance(model, torch.nn.Module):
        why = "a function has no weights by name"
        raise BindError(why, where="refit", hint="write to the tensors that it uses, in place")
    if not isinstance(state, Mapping):
        why = f"new weights come as a dict of tensors; got a {type(state).__qualname__}"
        raise ConfigError(why, hint="pass trained.state_dict()")
    held = dict(own_tensors(model))
    for name, new in state.items():
        if name not in held:
            why = "the model has no such weight"
            hint = did_you_mean(name, held) or "names are those of model.state_dict()"
            raise BindError(why, where=name, hint=hint)
        if problem := _unfit(held[name], new):
            raise BindError(problem, where=name, hint="compile the model again for other weights")
    own = {torch_compat.storage_id(each) for each in held.values()}
    # A value that is another weight of the model may be written before it is read.
    return lambda: [
        (held[name], new.clone() if torch_compat.storage_id(new) in own else new)
        for name, new in state.items()
    ]
