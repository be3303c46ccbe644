"""What another process needs to know to serve a decoder whole. In: what running it showed, and kinds of calls. Out: JSON data and plain values for an artifact; and the same again.

It runs nothing: what an admission found out by running the model is taken over once everything that it was found out of is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from piecework.integrations.transformers.own.cache_state import CACHE, CacheForm
from piecework.integrations.transformers.own.outside import LOADER, SAVER, as_json, outside
from piecework.integrations.transformers.whole.forward import CallKind, Habits

#: The file of an artifact that holds what JSON does not: classes and dtypes among it.
KINDS = "kinds.pickle"


@dataclass(frozen=True, slots=True)
class KeptKind:
    """A kind of call, and what serves it.

    Attributes:
        kind: of calls.
        held: the attributes that the layers of its cache have afterwards.
        why: why the model's own forward serves it; None where a stitched module does.
    """

    kind: CallKind
    held: tuple[str, ...]
    why: str | None


@dataclass(frozen=True, slots=True)
class KeptWay:
    """What was found out of a decoder.

    Attributes:
        habits: what running it showed.
        kinds: of calls that came; those that a stitched module serves in the order of the artifact's parts.
        unrolled: whether calls of one token (True), or of more than one, are left to the model's own forward.
        not_flat: message, place and hint of the reason why it is not served flat, if that was tried.
    """

    habits: Habits
    kinds: Sequence[KeptKind]
    unrolled: frozenset[bool]
    not_flat: tuple[str, str | None, str | None] | None

    def values(self) -> tuple[object, ...]:
        """As plain values, which an artifact may hold."""
        habits = self.habits
        return (
            _habits_values(habits),
            [(_kind_values(each.kind), each.held, each.why) for each in self.kinds],
            self.unrolled,
            self.not_flat,
        )

    @classmethod
    def of_values(cls, values: Any) -> KeptWay:
        """What `values` said."""
        habits, kinds, unrolled, not_flat = values
        found = [KeptKind(_kind(kind), held, why) for kind, held, why in kinds]
        return cls(Habits(*habits), found, unrolled, not_flat)


def kept_of(model: nn.Module, decoder: nn.Module) -> dict[str, object]:
    """What an artifact says of an admitted model."""
    of = outside(model, decoder)
    return as_json({"load": LOADER, "save": SAVER, "way": "whole", "of": of})


def _habits_values(habits: Habits) -> tuple[object, ...]:
    return tuple(getattr(habits, each.name) for each in fields(Habits))


def _kind_values(kind: CallKind) -> tuple[object, ...]:
    cache = None if kind.cache is None else _form_values(kind.cache)
    return kind.tensors, kind.flags, cache, kind.one, kind.implementation


def _form_values(form: CacheForm) -> tuple[object, ...]:
    own = tuple(
        (name, (kind, _form_values(what) if isinstance(what, CacheForm) else what))
        for name, (kind, what) in form.own
    )
    return form.kind, own, form.layers, form.is_filled


def _form(values: Any) -> CacheForm:
    cache, own, layers, is_filled = values
    parts = tuple(
        (name, (kind, _form(what) if kind == CACHE else what)) for name, (kind, what) in own
    )
    return CacheForm(cache, parts, layers, is_filled)


def _kind(values: Any) -> CallKind:
    tensors, flags, cache, one, implementation = values
    form = None if cache is None else _form(cache)
    return CallKind(tensors, flags, form, one, implementation)
