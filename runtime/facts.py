"""What a trace made constant. In: the places that Dynamo read while it traced. Out: facts about the model's Python that a call can watch.

A captured graph runs no Python: a number, a flag, a missing bias or a module without weights is in it for good. Each such fact
is looked up the way the trace did; arguments are not its business, and neither are torch's own modules.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from piecework.runtime.dict_watch import WATCHED
from piecework.runtime.places import Key, Step, imported, parsed, readable

_CONSTANTS = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_MISSING = object()


@dataclass(frozen=True, slots=True)
class Fact:
    """Something at a place that the trace relied on.

    Attributes:
        start: a module, an object or a Python module.
        keys: the look-ups from there.
        path: what errors call the place.
        kind: ``"constant"``: an equal value; ``"module"``: a module of the same class with as many forward hooks.
        value: what the trace found.
        calls: of a module that the trace called, what beside its class decided what that did.
    """

    start: object
    keys: tuple[Key, ...]
    path: str
    kind: Literal["constant", "module"]
    value: object
    calls: tuple[object, ...] = ()

    def now(self) -> object:
        """What is there now."""
        value = self.start
        for kind, key in self.keys:
            value = _looked_up(value, kind, key)
        return value

    def holds(self) -> bool:
        """Whether the graph is still right about it."""
        now = self.now()
        if type(now) is not type(self.value):
            return False
        if self.kind == "module" and self.calls:
            forward, *_ = calls = _calls(now)
            # A model whose forward was replaced runs the graph from there, behind its own hooks.
            return calls == self.calls or (not self.keys and forward is not self.calls[0])
        if self.kind == "module":
            return True
        return repr(now) == repr(self.value) if type(now) is float else bool(now == self.value)

    def difference(self) -> str:
        """What a call says when it doesn't hold."""
        now = self.now()
        if self.kind == "constant":
            shown = "gone" if now is _MISSING else repr(now)
            return f"{self.path} was {self.value!r} when the model was traced and is {shown} now"
        if type(now) is not type(self.value):
            return f"module {self.path} was a {type(self.value).__qualname__} when the model was traced and is a {type(now).__qualname__} now"
        return f"module {self.path or 'model'} has another forward, or other forward hooks, than when the model was traced"

    def steps(self) -> Iterator[Step]:
        """The look-ups in dictionaries on the way there, and for a module what decides what a call of it does."""
        value = self.start
        for kind, key in self.keys:
            held = value if kind == "item" else getattr(value, "__dict__", None)
            value = _looked_up(value, kind, key)
            if type(held) in WATCHED and key in held:  # type: ignore[operator]
                yield Step(held, key, held[key], self.path)
        if self.calls and isinstance(value, torch.nn.Module):
            yield Step(
                value.__dict__, "forward", value.__dict__.get("forward"), self._of("forward")
            )
            for name in _HOOKS:
                hooks = value.__dict__[name]
                yield Step(hooks, None, len(hooks), self._of(name), "size")

    def _of(self, name: str) -> str:
        return f"{self.path}.{name}".lstrip(".")


def facts_of(model: object, places: Sequence[tuple[str, str]]) -> tuple[Fact, ...]:
    """The facts at ``places`` (Dynamo's names, and what it guards) that can be looked up again from ``model``."""
    found: dict[tuple[int, tuple[Key, ...]], Fact] = {}
    names = {name for name, _ in places}
    for place in sorted(names):
        parts = parsed(place)
        if parts is None:
            continue
        root, (first, *rest) = parts[0], parts[1]
        if (root, first[1]) == ("L", "model"):
            start: object = model
        else:
            start = imported(str(first[1])) if root == "G" else None
            name = getattr(start, "__name__", "torch")
            if name.partition(".")[0] in ("torch", "piecework", "builtins"):
                continue
        value = start
        for kind, key in rest:
            value = _looked_up(value, kind, key)
        constant = type(value) in _CONSTANTS
        if constant or isinstance(value, torch.nn.Module):
            kind_ = "constant" if constant else "module"
            called = (
                f"{place}.{_HOOKS[0]}" in names
            )  # where Dynamo went through the module's __call__
            calls = _calls(value) if called else ()
            fact = Fact(start, tuple(rest), readable(place), kind_, value, calls)  # type: ignore[arg-type]
            found.setdefault((id(start), fact.keys), fact)
    return tuple(found.values())


def _calls(module: object) -> tuple[object, ...]:
    held = module.__dict__
    return held.get("forward"), *(len(held[name]) for name in _HOOKS)


def _looked_up(value: object, kind: str, key: object) -> object:
    try:
        return value[key] if kind == "item" else getattr(value, str(key), _MISSING)  # type: ignore[index]
    except (LookupError, TypeError):
        return _MISSING
